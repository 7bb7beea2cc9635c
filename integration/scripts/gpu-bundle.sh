#!/usr/bin/env bash
# Builds .bundle/: everything that runs the GPU tests and benchmarks on a machine without packages, and an offline
# installer. At most 60 MiB. Podman in it needs a C library of at least 2.39 there (Ubuntu 24.04).
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
cd "$top"
integration/scripts/setup.sh engines
[ -d .tools/trixie ] || { echo "gpu-bundle: needs the CRIU that setup.sh fetches; this machine has its own" >&2; exit 1; }
cargo build --release --quiet -p phos-runc -p phos-shim -p phos-hooks -p phos-sample
cargo build --release --quiet -p simcuda
cargo build --release --quiet -p phos-integration --bin copy-bench --bin demo --bin soak --bin fault-soak --bin sandbox-init
cargo build --profile faults --quiet -p phos-runc
bundle=.bundle
rm -rf "$bundle"
mkdir -p "$bundle"/{bin,lib,criu,workloads}
install -m 755 target/release/phos-runc target/release/libphos.so target/release/phos-hook "$bundle/bin/"
# Packed: it is for one kind of run only.
strip -o "$bundle/phos-runc-faults" target/faults/phos-runc
xz -9 "$bundle/phos-runc-faults"
install -m 755 target/release/{phos-sample,copy-bench,demo,soak,fault-soak,sandbox-init,libsimcuda.so} "$bundle/bin/"
install -m 755 "$(command -v busybox)" "$bundle/bin/"
install -m 755 .tools/trixie/usr/sbin/runc "$bundle/bin/"
lib=.tools/trixie/usr/lib/x86_64-linux-gnu
cp -L "$lib/libseccomp.so.2" "$bundle/lib/"
# CRIU with exactly the libraries it loads.
install -m 755 .tools/trixie/usr/sbin/criu "$bundle/criu/"
"$lib/ld-linux-x86-64.so.2" --library-path "$lib" --list .tools/trixie/usr/sbin/criu |
    grep -oE '[^ ]+\.so[.0-9]* ' | xargs -n1 basename | sort -u | while read -r name; do
    [ ! -e "$lib/$name" ] || cp -L "$lib/$name" "$bundle/criu/"
done
cp -L "$lib/ld-linux-x86-64.so.2" "$bundle/criu/"
cat >"$bundle/bin/criu" <<'W'
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")/../criu
exec "$here/ld-linux-x86-64.so.2" --library-path "$here" "$here/criu" "$@"
W
chmod 755 "$bundle/bin/criu"
# Podman and its monitor, with the libraries they load beyond the C library's; packed, for they are large.
root=.tools/debian-13
lib=$root/usr/lib/x86_64-linux-gnu
podman=$(mktemp -d)
mkdir "$podman/lib"
install -m 755 "$root"/usr/bin/{podman,conmon} "$root/usr/lib/podman/netavark" "$podman/"
for program in podman conmon netavark; do
    "$lib/ld-linux-x86-64.so.2" --library-path "$lib" --list "$podman/$program"
done | grep -oE '[^ ]+\.so[.0-9]* ' | xargs -n1 basename | sort -u | grep -vE '^(linux-vdso|ld-linux|libc\.|libm\.|libpthread|libdl|libgcc)' |
    while read -r name; do cp -L "$lib/$name" "$podman/lib/"; done
tar -C "$podman" -cJf "$bundle/podman.tar.xz" .
rm -rf "$podman"
cp integration/workloads/*.py "$bundle/workloads/"
cp integration/gpu/*.py integration/gpu/install.sh LICENSE "$bundle/"
git rev-parse --short HEAD >"$bundle/COMMIT"
size=$(du -sm "$bundle" | cut -f1)
echo "$bundle: $size MiB"
[ "$size" -le 60 ]
