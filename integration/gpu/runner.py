#!/usr/bin/env python3
"""Runs the GPU tests and benchmarks of phos-runc from a bundle, on a machine with an NVIDIA GPU, root, cgroup v2 and
Python, but no packages. Results are JSON lines in the form that integration/results/ keeps; a table is printed last.

  runner.py torch [--gb 20] [--gb 2] [--plain]   PyTorch in a container: pause, restore, bit-identical or not
  runner.py overhead                             steps per second with and without libphos.so

Standard library only. Everything it makes lies below /run/phos-bench and is removed at the end.
"""
import argparse
import ctypes
import datetime
import glob
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
BIN = os.path.join(HERE, "bin")
WORK = "/run/phos-bench"
OUT = os.environ.get("OUT", HERE)
DRIVER = "/usr/local/nvidia"
PYTHON = shutil.which("python3")
ENV = dict(os.environ, PATH=BIN + ":" + os.environ["PATH"], PHOS_STATE_DIR=WORK + "/state", PHOS_CRIU=BIN + "/criu",
           PHOS_LOWER_RUNTIME=BIN + "/runc", PHOS_LIB_DIR=BIN, PHOS_CONFIG="/nonexistent", CRIU_LIBS_DIR=WORK + "/no-plugins")
rows = []


def log(text):
    print(f"[{time.monotonic() - START:7.1f}] {text}", flush=True)


def result(bench, workload, system, metric, value, n=1, stat="single", note=""):
    rows.append(dict(bench=bench, workload=workload, system=system, metric=metric, value=round(float(value), 3), stat=stat,
                     n=n, device=GPU["name"], driver=GPU["driver"], commit=COMMIT,
                     date=datetime.date.today().isoformat(), note=note))


def run(*words, timeout=300, check=True, env=ENV, detached=False, **more):
    # A detached container inherits these streams: it must neither hold a pipe of ours open nor a deleted file.
    output = subprocess.DEVNULL if detached else subprocess.PIPE
    done = subprocess.run(words, env=env, timeout=timeout, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True, **more)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: status {done.returncode}: {(done.stderr or '').strip()[-2000:]}")
    return done


def setup():
    shutil.rmtree(WORK, ignore_errors=True)
    os.makedirs(WORK)
    run("mount", "-t", "tmpfs", "-o", "size=115g,mode=755", "tmpfs", WORK)
    for d in ("upper", "over", "rootfs", "state", "out", "images", "no-plugins"):
        os.makedirs(f"{WORK}/{d}")
    run("mount", "-t", "overlay", "-o", f"lowerdir=/,upperdir={WORK}/upper,workdir={WORK}/over", "overlay", f"{WORK}/rootfs")
    for library in ("libseccomp.so.2",):
        if not any(os.path.exists(f"{d}/{library}") for d in ("/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu")):
            shutil.copy(f"{BIN}/../lib/{library}", "/usr/lib/x86_64-linux-gnu/")


def teardown():
    for path in (f"{WORK}/rootfs", WORK):
        subprocess.run(["umount", "-l", path], stderr=subprocess.DEVNULL)
    shutil.rmtree(WORK, ignore_errors=True)


def spec(command, annotations):
    devices, rules = [], [{"allow": False, "access": "rwm"}]
    for path in filter(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")):
        st = os.stat(path)
        major, minor = os.major(st.st_rdev), os.minor(st.st_rdev)
        devices.append(dict(path=path, type="c", major=major, minor=minor, fileMode=0o666, uid=0, gid=0))
        rules.append(dict(allow=True, type="c", major=major, minor=minor, access="rwm"))
    caps = [f"CAP_{c}" for c in ("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID", "SYS_ADMIN", "SYS_PTRACE", "KILL")]
    env = [f"PATH={os.environ['PATH']}", f"LD_LIBRARY_PATH={DRIVER}/lib64", "HOME=/root", "CUBLAS_WORKSPACE_CONFIG=:4096:8"]
    plain = ["nosuid", "noexec", "nodev"]
    return {
        "ociVersion": "1.0.2",
        "process": {"terminal": False, "user": {"uid": 0, "gid": 0}, "args": command, "env": env, "cwd": "/",
                    "capabilities": {k: caps for k in ("bounding", "effective", "permitted")},
                    "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 20000, "soft": 20000}]},
        "root": {"path": f"{WORK}/rootfs", "readonly": False},
        "hostname": "phos",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": plain + ["mode=1777", "size=1g"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": plain + ["ro"]},
            {"destination": DRIVER, "type": "bind", "source": DRIVER, "options": ["rbind", "ro"]},
            {"destination": "/out", "type": "bind", "source": f"{WORK}/out", "options": ["bind", "rw"]},
            {"destination": "/bundle", "type": "bind", "source": HERE, "options": ["bind", "ro"]},
        ],
        "linux": {"namespaces": [{"type": t} for t in ("pid", "mount", "ipc", "uts")], "devices": devices,
                  "resources": {"devices": rules}, "cgroupsPath": "/phos-bench"},
        "annotations": annotations,
    }


class Container:
    """A container of `torch_steps.py` under phos-runc, or under runc alone."""

    def __init__(self, name, gb, plain=False):
        self.name, self.plain = name, plain
        self.program = f"{BIN}/runc" if plain else f"{BIN}/phos-runc"
        self.bundle, self.log = f"{WORK}/{name}", f"{WORK}/out/{name}.log"
        os.makedirs(self.bundle)
        command = [PYTHON, "/bundle/workloads/torch_steps.py", "--gb", str(gb), "--out", f"/out/{name}.log", "--stop", f"/out/{name}.stop"]
        with open(f"{self.bundle}/config.json", "w") as f:
            json.dump(spec(command, {}), f)

    def runc(self, *words, **more):
        more.setdefault("env", dict(ENV, PHOS_REPORT=f"{WORK}/report.json"))
        return run(self.program, "--root", f"{WORK}/runc", "--log", f"{WORK}/{self.name}.runc.log", *words, **more)

    def start(self):
        # Detached, with nothing of ours as its streams.
        self.runc("run", "--detach", "--bundle", self.bundle, self.name, detached=True)
        log(f"{self.name} started")

    def steps(self):
        try:
            with open(self.log) as f:
                lines = [line.split() for line in f if line.endswith("\n")]
        except FileNotFoundError:
            return []
        return [(int(a), b, int(c)) for a, b, c in lines]

    def wait_steps(self, more, limit=120):
        have = len(self.steps())
        end = time.monotonic() + limit
        while len(self.steps()) < have + more:
            if time.monotonic() > end:
                raise RuntimeError(f"{self.name} makes no steps: {self.runc('state', self.name, check=False).stdout}")
            time.sleep(0.05)

    def pid(self):
        return json.loads(self.runc("state", self.name).stdout)["pid"]

    def checkpoint(self, image, leave_running):
        words = ["checkpoint", "--image-path", image, "--work-path", image + ".work"]
        os.makedirs(image + ".work")
        self.runc(*words, *(["--leave-running"] if leave_running else []), self.name)

    def restore(self, image):
        self.runc("restore", "--detach", "--bundle", self.bundle, "--image-path", image, "--work-path", image + ".work", self.name, detached=True)

    def report(self):
        with open(f"{WORK}/report.json") as f:
            return json.load(f)

    def stop(self):
        open(f"{WORK}/out/{self.name}.stop", "w").close()
        for _ in range(200):
            if json.loads(self.runc("state", self.name, check=False).stdout or '{"status":"stopped"}').get("status") == "stopped":
                break
            time.sleep(0.05)
        self.runc("delete", "--force", self.name, check=False)


def longest_gap(steps, since_ns):
    """Longest time between two steps of which the later came after `since_ns`, in ms."""
    return max(((b[2] - a[2]) / 1e6 for a, b in zip(steps, steps[1:]) if b[2] > since_ns), default=0)


class Driver:
    """The driver's own checkpoint calls, from a helper process that has a driver of its own."""

    def __init__(self):
        self.process = subprocess.Popen([PYTHON, os.path.abspath(__file__), "driver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline().strip() == "0"

    def call(self, verb, pid):
        self.process.stdin.write(f"{verb} {pid}\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        if code:
            raise RuntimeError(f"cuCheckpointProcess{verb}: CUDA error {code}")

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)


def serve_driver():
    cuda = ctypes.CDLL(f"{DRIVER}/lib64/libcuda.so.1")
    print(cuda.cuInit(0), flush=True)
    for line in sys.stdin:
        verb, pid = line.split()
        args = (ctypes.c_uint64 * 8)(10000)  # CUcheckpointLockArgs: timeoutMs, then zeros
        print(getattr(cuda, "cuCheckpointProcess" + verb)(int(pid), args if verb == "Lock" else None), flush=True)


def compare(steps, reference):
    """1 if the steps follow each other and every one that the reference has is the same."""
    numbers = [s[0] for s in steps]
    if numbers != list(range(len(numbers))) or not numbers:
        log(f"steps are not contiguous: {[a for a, b in zip(numbers, range(len(numbers))) if a != b][:3]}")
        return 0, 0
    pairs = list(zip(steps, reference))
    wrong = [a[0] for a, b in pairs if a[1] != b[1]]
    if wrong:
        log(f"first wrong step {wrong[0]}")
    return int(not wrong), len(pairs)


def reference(gb, steps):
    path = f"{WORK}/out/reference-{gb}.log"
    run(PYTHON, f"{HERE}/workloads/torch_steps.py", "--gb", str(gb), "--steps", str(steps), "--out", path, env=dict(os.environ), timeout=180)
    with open(path) as f:
        return [(int(a), b, int(c)) for a, b, c in map(str.split, f)]


def phos(gb, count):
    name = f"torch-{gb:g}g"
    box = Container(name, gb)
    box.start()
    box.wait_steps(60)
    pauses = []
    for i in range(count):
        image = f"{WORK}/images/{name}-{i}"
        before = time.monotonic_ns()
        box.checkpoint(image, True)
        box.wait_steps(30)
        gap = longest_gap(box.steps(), before)
        report = box.report()
        pauses.append((gap, report))
        log(f"{name} leave-running {i}: pause {gap:.0f} ms  " + " ".join(f"{k[:-3]} {v:.0f}" for k, v in report.items() if k.endswith("_ms")))
        result("pause", name, "phos-runc", "pause_ms", gap, note=f"leave-running {i}")
        shutil.rmtree(image)
    for metric, keys in (("gpu_pause_ms", ("snapshot_ms", "park_ms", "attach_ms")), ("driver_ms", ("driver_checkpoint_ms", "driver_restore_ms")), ("criu_ms", ("criu_ms",))):
        result("pause", name, "phos-runc", metric, statistics.median(sum(r[k] for k in keys) for _, r in pauses), len(pauses), "median")
    result("pause", name, "phos-runc", "pause_ms", statistics.median(p for p, _ in pauses), len(pauses), "median")
    copied = statistics.median(r["gpu_bytes"] / 1e6 / r["copy_ms"] for _, r in pauses)
    result("copy", name, "phos-runc", "copy_gb_s", copied, len(pauses), "median", "tmpfs")
    image = f"{WORK}/images/{name}-stop"
    box.checkpoint(image, False)
    last = len(box.steps())
    gpu_bytes = box.report()["gpu_bytes"]
    log(f"{name} stopped at step {last}: {gpu_bytes / 1e9:.1f} GB on the GPU, report {box.report()}")
    begin = time.monotonic()
    box.restore(image)
    running = time.monotonic()
    box.wait_steps(1)
    first = time.monotonic()
    log(f"{name} restored in {running - begin:.2f} s, first step after {first - begin:.2f} s, report {box.report()}")
    result("restore", name, "phos-runc", "restore_ms", (running - begin) * 1e3, note="to running")
    result("restore", name, "phos-runc", "restore_ms", (first - begin) * 1e3, note="to first result")
    box.wait_steps(60)
    box.stop()
    return box.steps(), gpu_bytes


def plain(gb):
    name = f"plain-{gb:g}g"
    workload = f"torch-{gb:g}g"
    driver = Driver()
    box = Container(name, gb, plain=True)
    box.start()
    box.wait_steps(60)
    pid = box.pid()
    image = f"{WORK}/images/{name}"
    before = time.monotonic_ns()
    times = [time.monotonic()]
    for step in (("Lock", "Checkpoint"), None, ("Restore", "Unlock")):
        if step:
            for verb in step:
                driver.call(verb, pid)
        else:
            box.checkpoint(image, True)
        times.append(time.monotonic())
    box.wait_steps(3)
    gap = longest_gap(box.steps(), before)
    parts = [b - a for a, b in zip(times, times[1:])]
    log(f"{name}: pause {gap:.0f} ms (driver {parts[0]:.2f} s, criu {parts[1]:.2f} s, driver {parts[2]:.2f} s)")
    result("pause", workload, "plain", "pause_ms", gap)
    result("pause", workload, "plain", "driver_ms", (parts[0] + parts[2]) * 1e3)
    result("pause", workload, "plain", "criu_ms", parts[1] * 1e3)
    shutil.rmtree(image)
    driver.call("Lock", pid)
    driver.call("Checkpoint", pid)
    box.checkpoint(image + "-stop", False)
    begin = time.monotonic()
    box.restore(image + "-stop")
    pid = box.pid()
    driver.call("Restore", pid)
    driver.call("Unlock", pid)
    running = time.monotonic()
    box.wait_steps(1)
    result("restore", workload, "plain", "restore_ms", (running - begin) * 1e3, note="to running")
    result("restore", workload, "plain", "restore_ms", (time.monotonic() - begin) * 1e3, note="to first result")
    log(f"{name}: restored in {running - begin:.2f} s")
    box.stop()
    driver.close()
    shutil.rmtree(image + "-stop", ignore_errors=True)


def torch(args):
    for gb in args.gb or [2.0, 20.0]:
        steps, gpu_bytes = phos(gb, args.count)
        shutil.rmtree(f"{WORK}/images")
        os.makedirs(f"{WORK}/images")
        same, compared = compare(steps, reference(gb, len(steps)))
        log(f"torch-{gb:g}g: {len(steps)} steps, {compared} compared, bit identical: {same}")
        result("pause", f"torch-{gb:g}g", "phos-runc", "bit_identical", same, compared, note="steps compared with an uninterrupted run")
        if args.plain and gb == max(args.gb or [20.0]):
            plain(gb)


def overhead(args):
    """Steps per second over the same stretch of steps, with and without the library, alternating."""
    gb, rates = (args.gb or [2.0])[0], {"phos-runc": [], "runc": []}
    for i in range(args.count):
        for system in rates:
            box = Container(f"{system}-{i}", gb, plain=system == "runc")
            box.start()
            box.wait_steps(args.steps + 50)
            steps = box.steps()
            box.stop()
            rates[system].append(args.steps / ((steps[49 + args.steps][2] - steps[49][2]) / 1e9))
            log(f"{system} {i}: {rates[system][-1]:.2f} steps/s")
    fraction = statistics.median(rates["phos-runc"]) / statistics.median(rates["runc"])
    result("overhead", f"torch-{gb:g}g", "phos-runc", "rate_fraction", fraction, args.count, "median")


def gpu():
    text = run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", env=dict(os.environ)).stdout
    name, driver = text.splitlines()[0].split(", ")
    return dict(name=name, driver=driver)


if __name__ == "__main__":
    START = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["torch", "overhead", "driver"])
    parser.add_argument("--gb", type=float, action="append")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    if args.what == "driver":
        serve_driver()
        sys.exit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    GPU = gpu()
    try:
        COMMIT = open(os.path.join(HERE, "COMMIT")).read().strip()
    except FileNotFoundError:
        COMMIT = "unknown"
    status = 0
    setup()
    try:
        {"torch": torch, "overhead": overhead}[args.what](args)
    except Exception as e:  # the figures so far are kept
        status = 1
        log(f"FAILED: {e}")
        for pattern in ("state/*/engine.log", "images/*/*.log", "images/*.work/*.log", "*.runc.log"):
            for path in glob.glob(f"{WORK}/{pattern}"):
                print(f"--- {path}")
                print(open(path, errors="replace").read()[-2500:])
    finally:
        for name in os.listdir(f"{WORK}/runc") if os.path.isdir(f"{WORK}/runc") else []:
            subprocess.run([f"{BIN}/runc", "--root", f"{WORK}/runc", "delete", "--force", name], stderr=subprocess.DEVNULL)
        with open(os.path.join(OUT, f"{args.what}.jsonl"), "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)
        teardown()
    for r in rows:
        print(f"{r['bench']:9} {r['workload']:11} {r['system']:10} {r['metric']:15} {r['value']:>12} {r['note']}")
    sys.exit(status)
