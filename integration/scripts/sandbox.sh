#!/usr/bin/env bash
# Runs a command in PID and mount namespaces of its own, under a process that reaps orphans: whatever a container
# runtime or CRIU does wrong ends with it. Needs root.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
profile=${PROFILE:-debug}
exec unshare --pid --fork --mount --mount-proc --kill-child -- "$top/target/$profile/sandbox-init" "$@"
