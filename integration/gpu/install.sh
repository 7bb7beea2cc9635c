#!/bin/sh
# Installs phos-runc from this folder, on a machine without packages: PREFIX (/usr/local) gets phos-runc, libphos.so,
# phos-hook, and runc and CRIU where the machine has none. Overwrites no configuration.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
prefix=${PREFIX:-/usr/local}
install -D -m 755 "$here/bin/phos-runc" "$prefix/bin/phos-runc"
install -D -m 755 "$here/bin/libphos.so" "$prefix/lib/phos/libphos.so"
install -D -m 755 "$here/bin/phos-hook" "$prefix/lib/phos/phos-hook"
if ! command -v runc >/dev/null; then
    install -D -m 755 "$here/bin/runc" "$prefix/sbin/runc"
    ldconfig -p | grep -q libseccomp.so.2 || { install -D -m 644 "$here/lib/libseccomp.so.2" "$prefix/lib/libseccomp.so.2"; ldconfig; }
fi
version=$(criu --version 2>/dev/null | sed -n 's/^Version: *//p')
if [ "$(printf '%s\n4.1\n' "${version:-0}" | sort -V | head -n 1)" != 4.1 ]; then
    rm -rf "$prefix/lib/phos/criu-files"
    mkdir -p "$prefix/lib/phos/criu-files/bin"
    cp -r "$here/criu" "$prefix/lib/phos/criu-files/criu"
    cp "$here/bin/criu" "$prefix/lib/phos/criu-files/bin/criu"
    ln -sf "$prefix/lib/phos/criu-files/bin/criu" "$prefix/lib/phos/criu"
fi
"$prefix/bin/phos-runc" --version
