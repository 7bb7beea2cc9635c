"""PyTorch in a Podman container: the commands people type, each followed by steps that are compared."""
import json
import os
import subprocess
import tarfile
import time

from compare import identical
from harness import BIN, CARD, DRIVER, ENV, HERE, PYTHON, WORK, log, longest_gap, result, run, steps_in

NAME = "podman-torch"
PLACE = f"{WORK}/podman"


def script(path, text):
    with open(path, "w") as f:
        f.write("#!/bin/sh\n" + text)
    os.chmod(path, 0o755)


def install():
    """Podman with everything of its own below the runner's place."""
    with tarfile.open(f"{HERE}/podman.tar.xz") as archive:
        archive.extractall(PLACE, filter="tar")
    libraries = f"{PLACE}/lib"
    os.rename(f"{PLACE}/conmon", f"{PLACE}/conmon.real")
    # Podman gives its monitor an environment of its own, and the monitor hands that on to the runtime.
    script(f"{PLACE}/conmon", f'LD_LIBRARY_PATH={libraries} exec {PLACE}/conmon.real "$@"\n')
    settings = "".join(f"export {k}='{v}'\n" for k, v in ENV.items() if k.startswith(("PHOS_", "CRIU_")) or k == "PATH")
    script(f"{PLACE}/phos-runc", f'unset LD_LIBRARY_PATH\nexport PHOS_REPORT={WORK}/report.json\n{settings}exec {BIN}/phos-runc "$@"\n')
    with open(f"{PLACE}/containers.conf", "w") as f:
        f.write(f'''[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
conmon_path = ["{PLACE}/conmon"]
helper_binaries_dir = ["{PLACE}"]
runtime_supports_json = ["phos-runc", "runc", "crun"]
[engine.runtimes]
phos-runc = ["{PLACE}/phos-runc"]
''')


class Box:
    """The container, as far as the comparison needs it."""

    name, env = NAME, ()
    workload = ("torch_steps.py", "--gb", "4")

    def __init__(self):
        self.log = f"{WORK}/out/{NAME}.log"
        self.words = [f"{PLACE}/podman", "--root", f"{PLACE}/root", "--runroot", f"{PLACE}/run", "--tmpdir", f"{PLACE}/tmp", "--storage-driver", "vfs",
                      "--runtime", f"{PLACE}/phos-runc"]
        self.environment = dict(os.environ, CONTAINERS_CONF=f"{PLACE}/containers.conf", LD_LIBRARY_PATH=f"{PLACE}/lib", PATH=ENV["PATH"])

    def podman(self, *words, check=True, timeout=120):
        done = run(*self.words, *words, env=self.environment, timeout=timeout, check=check)
        return (done.stdout + done.stderr).strip()

    def start(self):
        devices = [w for d in ("/dev/nvidiactl", f"/dev/nvidia{CARD}", "/dev/nvidia-uvm") for w in ("--device", d)]
        mounts = [w for m in (f"{DRIVER}:{DRIVER}:ro", f"{WORK}/out:/out", f"{HERE}:/bundle:ro") for w in ("-v", m)]
        variables = [w for e in (f"LD_LIBRARY_PATH={DRIVER}/lib64", f"PATH={os.environ['PATH']}", "CUBLAS_WORKSPACE_CONFIG=:4096:8") for w in ("-e", e)]
        # What it says goes nowhere: the monitor's pipes are all that it has open.
        self.podman("run", "-d", "--name", NAME, "--network", "host", "--security-opt", "label=disable", *devices, *mounts, *variables,
                    "--rootfs", f"{WORK}/rootfs", PYTHON, f"/bundle/workloads/{self.workload[0]}", *self.workload[1:],
                    "--out", f"/out/{NAME}.log", "--stop", f"/out/{NAME}.stop")

    def steps(self):
        return steps_in(self.log)

    def wait_steps(self, more, limit=90):
        have, end = len(self.steps()), time.monotonic() + limit
        while len(self.steps()) < have + more:
            if time.monotonic() > end:
                raise RuntimeError(f"no steps: {self.podman('logs', NAME, check=False)[-500:]}")
            time.sleep(0.05)


def flow(args):
    install()
    box = Box()
    log(box.podman("--version"))
    try:
        box.start()
        box.wait_steps(50)
        before = time.monotonic_ns()
        box.podman("container", "checkpoint", "--leave-running", NAME)
        box.wait_steps(20)
        gap = longest_gap(box.steps(), before)
        with open(f"{WORK}/report.json") as f:
            report = json.load(f)
        log(f"podman container checkpoint --leave-running: pause {gap:.0f} ms, {report['gpu_bytes'] / 1e9:.1f} GB on the GPU")
        result("pause", NAME, "phos-runc", "pause_ms", gap, note="podman container checkpoint --leave-running")
        begin = time.monotonic()
        box.podman("container", "checkpoint", NAME)
        middle = time.monotonic()
        box.podman("container", "restore", NAME)
        box.wait_steps(1)
        log(f"podman container checkpoint {middle - begin:.2f} s, restore to the first step {time.monotonic() - middle:.2f} s")
        result("restore", NAME, "phos-runc", "restore_ms", (time.monotonic() - middle) * 1e3, note="podman container restore, to first result")
        box.wait_steps(50)
        open(f"{WORK}/out/{NAME}.stop", "w").close()
        box.podman("wait", NAME)
        identical(box, NAME)
    finally:
        log(box.podman("ps", "-a", check=False))
        subprocess.run([*box.words, "rm", "-f", "-a", "-t", "0"], env=box.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
