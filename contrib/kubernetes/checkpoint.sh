#!/bin/sh
# checkpoint.sh NAMESPACE POD CONTAINER: has the kubelet of this node checkpoint a container (Kubernetes 1.30 or newer, with
# containerd 2 or CRI-O below; run it on the node, as root). The kubelet answers with the path of the archive that it has
# written, in /var/lib/kubelet/checkpoints. Certificates as kubeadm lays them; KUBELET, CERT, KEY and CA name others.
set -eu
[ $# -eq 3 ] || { echo "usage: checkpoint.sh NAMESPACE POD CONTAINER" >&2; exit 2; }
pki=/etc/kubernetes/pki
exec curl --fail-with-body --silent --show-error --request POST \
    --cert "${CERT:-$pki/apiserver-kubelet-client.crt}" --key "${KEY:-$pki/apiserver-kubelet-client.key}" \
    --cacert "${CA:-/var/lib/kubelet/pki/kubelet.crt}" \
    "${KUBELET:-https://localhost:10250}/checkpoint/$1/$2/$3?timeout=240"
