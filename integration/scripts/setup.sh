#!/usr/bin/env bash
# Installs what the demo and the tests need and the machine lacks: runc, busybox, and a CRIU of at least 4.1 in
# .tools/ (Debian 13's, run by its own loader, where the machine has none). Needs root and apt. Quick when all is there.
# `setup.sh engines` installs Docker, containerd and Podman too, for the tests that type their commands, and an allocator that
# is preloaded beside libphos.so; and it unpacks the engines of Debian 13 and 14 in .tools/debian-13/ and .tools/debian-14/,
# root file systems that the tests enter.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
tools="$top/.tools"
mkdir -p "$tools"

say() { echo "setup: $*" >&2; }

packages=()
command -v runc >/dev/null || packages+=(runc)
command -v busybox >/dev/null || packages+=(busybox-static)
command -v python3 >/dev/null || packages+=(python3)
python3 -c "import yaml" 2>/dev/null || packages+=(python3-yaml)
command -v cc >/dev/null || packages+=(gcc libc6-dev)
if [ "${1:-}" = engines ]; then
    command -v podman >/dev/null || packages+=(podman)
    [ -e /usr/lib/x86_64-linux-gnu/libjemalloc.so.2 ] || packages+=(libjemalloc2)
    command -v conmon >/dev/null || packages+=(conmon)
    { command -v docker && { [ -x /usr/sbin/dockerd ] || [ -x /usr/bin/dockerd ]; }; } >/dev/null ||
        packages+=(docker.io containerd iptables)
fi
if [ ${#packages[@]} -gt 0 ]; then
    say "installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # Since Debian 13 a package of its own, which docker.io only recommends.
    if [[ " ${packages[*]} " = *" docker.io "* && -n $(apt-cache show docker-cli 2>/dev/null) ]]; then packages+=(docker-cli); fi
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

# Whether a program is a CRIU of at least 4.1.
new_enough() {
    local version
    version=$("$1" --version 2>/dev/null | sed -n 's/^Version: *//p') || return 1
    [ -n "$version" ] && [ "$(printf '%s\n4.1\n' "$version" | sort -V | head -n 1)" = 4.1 ]
}

# Fetches packages of a suite of Debian (on Ubuntu: of Ubuntu 26.04) with everything they need from the machine's own mirror,
# without touching its apt, and unpacks them in a folder of .tools/: FOLDER SUITE PACKAGE...
fetch() {
    local state="$tools/apt" target="$tools/$1" mirror sources suite="$2 main" signed=/usr/share/keyrings/debian-archive-keyring.gpg
    shift 2
    rm -rf "$state" "$target"
    mkdir -p "$state"/{lists/partial,cache/archives/partial,etc}
    : >"$state/status"
    # Debian's cloud images name their mirrors in a file beside the sources.
    sources=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources /etc/apt/mirrors/*.list \
        2>/dev/null || true)
    mirror=${PHOS_DEBIAN_MIRROR:-$(grep -oE 'https?://[^ ]+/debian/?( |$)' <<<"$sources" | head -n 1 | tr -d ' ' || true)}
    if [ -z "$mirror" ] && grep -q '^ID=ubuntu' /etc/os-release; then
        mirror=$(grep -oE 'https?://[^ ]+/ubuntu/?( |$)' <<<"$sources" | head -n 1 | tr -d ' ' || true)
        suite="resolute main universe" signed=/usr/share/keyrings/ubuntu-archive-keyring.gpg
    fi
    [ -n "$mirror" ] || { say "no Debian or Ubuntu mirror in apt's sources; set PHOS_DEBIAN_MIRROR or install criu 4.1 or newer"; exit 1; }
    [ -e "$signed" ] || apt-get install -y -qq --no-install-recommends "$(basename "$signed" .gpg)" >/dev/null
    echo "deb [signed-by=$signed] $mirror $suite" >"$state/etc/sources.list"
    local options=(-qq -o Dir::State="$state" -o Dir::State::status="$state/status" -o Dir::State::Lists="$state/lists"
        -o Dir::Cache="$state/cache" -o Dir::Etc::sourcelist="$state/etc/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::Etc::preferencesparts=/dev/null
        -o APT::Sandbox::User=root -o APT::Architecture=amd64 -o APT::Install-Recommends=false)
    apt-get "${options[@]}" update
    apt-get "${options[@]}" -y --download-only -o Debug::NoLocking=1 install "$@" >/dev/null
    # Links such as /lib come first.
    for package in "$state"/cache/archives/base-files_*.deb; do [ ! -e "$package" ] || dpkg -x "$package" "$target"; done
    printf '%s\n' "$state"/cache/archives/*.deb | xargs -P 2 -I{} dpkg -x {} "$target"
    rm -rf "$state"
}

if [ ! -x "$tools/bin/criu" ] || ! new_enough "$tools/bin/criu"; then
    mkdir -p "$tools/bin"
    if command -v criu >/dev/null && new_enough criu; then
        ln -sf "$(command -v criu)" "$tools/bin/criu"
    else
        say "fetching CRIU of Debian 13"
        fetch trixie trixie criu runc libseccomp2
        cat >"$tools/bin/criu" <<'W'
#!/bin/sh
# CRIU by its own loader: the machine's C library may be older.
root=$(dirname "$(readlink -f "$0")")/../trixie
lib="$root/usr/lib/x86_64-linux-gnu"
exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$root/usr/sbin/criu" "$@"
W
        chmod 755 "$tools/bin/criu"
    fi
fi
new_enough "$tools/bin/criu" || { say "CRIU in $tools/bin does not run"; exit 1; }

# A root file system of another generation: VERSION SUITE. Its packages' scripts do not run; what they would have made is made
# here.
generation() {
    local root="$tools/debian-$1" packages
    packages="base-files base-passwd dash bash coreutils tar gzip libc-bin busybox-static iptables iproute2 docker.io docker-cli podman conmon containerd runc crun libcriu2 criu"
    [ "$(cat "$root/.packages" 2>/dev/null)" != "$packages" ] || return 0
    say "fetching the engines of Debian $1"
    # shellcheck disable=SC2086
    fetch "debian-$1" "$2" $packages
    cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
    cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
    touch "$root/etc/hosts" "$root/etc/resolv.conf"
    # CRIU locks a container's network with these.
    ln -s xtables-nft-multi "$root/usr/sbin/iptables-restore"
    ln -s xtables-nft-multi "$root/usr/sbin/ip6tables-restore"
    echo "$packages" >"$root/.packages"
}

if [ "${1:-}" = engines ]; then
    if grep -q '^ID=debian' /etc/os-release || [ -n "${PHOS_DEBIAN_MIRROR:-}" ]; then
        generation 13 trixie
        generation 14 forky
    else
        say "no engines of Debian 13 and 14: set PHOS_DEBIAN_MIRROR to fetch them"
    fi
fi
