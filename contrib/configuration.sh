#!/bin/sh
# configuration.sh install|uninstall: the engines' configuration, with the program's path as PREFIX makes it. Called by make,
# which sets DESTDIR, PREFIX and SYSCONFDIR. What is on the host already is kept; what was changed is not removed.
set -eu
here=$(dirname "$0")
share=$PREFIX/share/phos-runc
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Files that engines read, and what they are made of: only where one file more is read beside the others.
drop_ins="podman/containers.conf:$SYSCONFDIR/containers/containers.conf.d/phos-runc.conf
crio/10-phos.conf:$SYSCONFDIR/crio/crio.conf.d/10-phos.conf
phos-runc/config.toml:$SYSCONFDIR/phos-runc/config.toml"
# Examples, to be merged by hand.
examples="docker/daemon.json containerd/config-v2.toml containerd/config-v3.toml containerd/phos.toml podman/containers.conf
crio/10-phos.conf kubernetes/runtimeclass.yaml kubernetes/pod.yaml kubernetes/checkpoint.sh phos-runc/config.toml"

for example in $examples; do
    mkdir -p "$work/$(dirname "$example")"
    sed "s,/usr/local/bin/phos-runc,$PREFIX/bin/phos-runc,g" "$here/$example" >"$work/$example"
done

case $1 in
    install)
        for example in $examples; do
            install -D -m 644 "$work/$example" "$DESTDIR$share/$example"
        done
        for pair in $drop_ins; do
            target=$DESTDIR${pair#*:}
            if [ ! -e "$target" ]; then
                install -D -m 644 "$work/${pair%%:*}" "$target"
            elif ! cmp -s "$work/${pair%%:*}" "$target"; then
                echo "kept ${pair#*:}, which differs from $share/${pair%%:*}"
            fi
        done
        ;;
    uninstall)
        for pair in $drop_ins; do
            target=$DESTDIR${pair#*:}
            if [ -e "$target" ] && ! cmp -s "$work/${pair%%:*}" "$target"; then
                echo "kept ${pair#*:}, which was changed"
            else
                rm -f "$target"
            fi
        done
        for example in $examples; do
            rm -f "$DESTDIR$share/$example"
            rmdir --ignore-fail-on-non-empty "$DESTDIR$share/$(dirname "$example")" 2>/dev/null || true
        done
        rmdir --ignore-fail-on-non-empty "$DESTDIR$share" 2>/dev/null || true
        ;;
    *)
        echo "usage: configuration.sh install|uninstall" >&2
        exit 2
        ;;
esac
