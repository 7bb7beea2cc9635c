"""What the runner works with: a private place, containers under phos-runc or runc alone, the driver's own checkpoint calls,
and the list of results."""
import ctypes
import datetime
import glob
import json
import os
import shutil
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
BIN = os.path.join(HERE, "bin")
# Which GPU, if there are several, and a name: runners may work beside each other.
CARD = int(os.environ.get("PHOS_BENCH_GPU", "0"))
PLACE = f"phos-bench-{CARD}" + os.environ.get("PHOS_BENCH_NAME", "")
WORK = f"/run/{PLACE}"
OUT = os.environ.get("OUT", HERE)
DRIVER = "/usr/local/nvidia"
PYTHON = shutil.which("python3")
ENV = dict(os.environ, PATH=BIN + ":" + os.environ["PATH"], PHOS_STATE_DIR=WORK + "/state", PHOS_CRIU=BIN + "/criu",
           PHOS_LOWER_RUNTIME=BIN + "/runc", PHOS_LIB_DIR=BIN, PHOS_CONFIG="/nonexistent", CRIU_LIBS_DIR=WORK + "/no-plugins")
rows = []
START = time.monotonic()


def gpu():
    text = run("nvidia-smi", "-i", str(CARD), "--query-gpu=name,driver_version", "--format=csv,noheader", env=dict(os.environ)).stdout
    name, driver = text.splitlines()[0].split(", ")
    return dict(name=name, driver=driver)


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


def touch(gb=32, threads=8):
    """Uses memory once: what a virtual machine has never used comes slowly from its hypervisor, to whoever is first."""
    zeros = bytes(16 << 20)

    def fill(name):
        with open(name, "wb") as f:
            for _ in range(gb * 10**9 // threads // len(zeros)):
                f.write(zeros)

    names = [f"{WORK}/touch-{i}" for i in range(threads)]
    pool = [threading.Thread(target=fill, args=(name,)) for name in names]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    for name in names:
        os.unlink(name)
    log(f"{gb} GB of memory touched")


def teardown():
    for path in (f"{WORK}/rootfs", WORK):
        subprocess.run(["umount", "-l", path], stderr=subprocess.DEVNULL)
    shutil.rmtree(WORK, ignore_errors=True)


def spec(command, annotations, more_env=()):
    devices, rules = [], [{"allow": False, "access": "rwm"}]
    for path in filter(os.path.exists, ("/dev/nvidiactl", f"/dev/nvidia{CARD}", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")):
        st = os.stat(path)
        major, minor = os.major(st.st_rdev), os.minor(st.st_rdev)
        devices.append(dict(path=path, type="c", major=major, minor=minor, fileMode=0o666, uid=0, gid=0))
        rules.append(dict(allow=True, type="c", major=major, minor=minor, access="rwm"))
    caps = [f"CAP_{c}" for c in ("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID", "SYS_ADMIN", "SYS_PTRACE", "KILL")]
    env = [f"PATH={os.environ['PATH']}", f"LD_LIBRARY_PATH={DRIVER}/lib64", "HOME=/root", "CUBLAS_WORKSPACE_CONFIG=:4096:8", "PYTHONFAULTHANDLER=1",
           *more_env]
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
                  "resources": {"devices": rules}, "cgroupsPath": f"/{PLACE}"},
        "annotations": annotations,
    }


def step_of(line):
    """Number, digest and time in ns of a step: `N DIGEST NS`, or as phos-sample writes it."""
    if line.startswith("step="):
        fields = dict(word.split("=", 1) for word in line.split())
        return int(fields["step"]), fields["digest"] if fields["ok"] == "1" else "wrong", int(fields["t_ms"]) * 10**6
    number, digest, when = line.split()
    return int(number), digest, int(when)


def steps_in(path):
    """The steps in a program's log, as far as it is written."""
    try:
        with open(path) as f:
            return [step_of(line) for line in f if line.endswith("\n")]
    except FileNotFoundError:
        return []


class Container:
    """A container of a workload under phos-runc, or under runc alone."""

    def __init__(self, name, workload, plain=False, annotations=None, env=()):
        self.name, self.plain, self.workload, self.env = name, plain, workload, env
        self.program = f"{BIN}/runc" if plain else f"{BIN}/phos-runc"
        self.bundle, self.log = f"{WORK}/{name}", f"{WORK}/out/{name}.log"
        os.makedirs(self.bundle)
        if workload[0].endswith(".py"):
            command = [PYTHON, f"/bundle/workloads/{workload[0]}", *workload[1:], "--out", f"/out/{name}.log", "--stop", f"/out/{name}.stop"]
        else:
            output = [] if "--bench" in workload else ["--out", f"/out/{name}.log", "--stop-file", f"/out/{name}.stop"]
            command = [f"/bundle/bin/{workload[0]}", *workload[1:], *output]
        # What it says goes to files that the container sees: CRIU cannot dump one that is the host's alone.
        command = ["/bin/sh", "-c", f'exec "$@" >>/out/{name}.txt 2>>/out/{name}.err', "sh", *command]
        with open(f"{self.bundle}/config.json", "w") as f:
            json.dump(spec(command, annotations or {}, env), f)

    def runc(self, *words, **more):
        more.setdefault("env", dict(ENV, PHOS_REPORT=f"{WORK}/report.json"))
        return run(self.program, "--root", f"{WORK}/runc", "--log", f"{WORK}/{self.name}.runc.log", *words, **more)

    def start(self):
        # Detached, with nothing of ours as its streams.
        self.runc("run", "--detach", "--bundle", self.bundle, self.name, detached=True)
        log(f"{self.name} started")

    def steps(self):
        return steps_in(self.log)

    def wait_steps(self, more, limit=120):
        have = len(self.steps())
        end = time.monotonic() + limit
        while len(self.steps()) < have + more:
            if time.monotonic() > end:
                raise RuntimeError(f"{self.name} makes no steps: {self.runc('state', self.name, check=False).stdout}")
            time.sleep(0.05)

    def pid(self):
        return json.loads(self.runc("state", self.name).stdout)["pid"]

    def checkpoint(self, image, leave_running, *more):
        words = ["checkpoint", "--image-path", image, "--work-path", image + ".work", *more]
        os.makedirs(image + ".work")
        self.runc(*words, *(["--leave-running"] if leave_running else []), self.name)

    def restore(self, image):
        self.runc("restore", "--detach", "--bundle", self.bundle, "--image-path", image, "--work-path", image + ".work", self.name, detached=True)

    def report(self):
        with open(f"{WORK}/report.json") as f:
            return json.load(f)

    def said(self):
        """What it printed."""
        with open(f"{WORK}/out/{self.name}.txt") as f:
            return f.read()

    def status(self):
        return json.loads(self.runc("state", self.name, check=False).stdout or '{"status":"stopped"}').get("status")

    def wait_end(self, limit=120):
        end = time.monotonic() + limit
        while self.status() != "stopped":
            if time.monotonic() > end:
                raise RuntimeError(f"{self.name} does not end")
            time.sleep(0.1)
        self.runc("delete", "--force", self.name, check=False)

    def stop(self):
        open(f"{WORK}/out/{self.name}.stop", "w").close()
        try:
            self.wait_end(20)
        except RuntimeError:
            self.runc("delete", "--force", self.name, check=False)


def criu_bytes(image):
    """Bytes of memory in CRIU's part of an image."""
    return sum(os.path.getsize(p) for p in glob.glob(f"{image}/pages-*.img"))


def longest_gap(steps, since_ns):
    """Longest time between two steps of which the later came after `since_ns`, in ms."""
    return max(((b[2] - a[2]) / 1e6 for a, b in zip(steps, steps[1:]) if b[2] > since_ns), default=0)


class Driver:
    """The driver's own checkpoint calls, from a helper process that has a driver of its own."""

    def __init__(self):
        self.process = subprocess.Popen([PYTHON, f"{HERE}/runner.py", "driver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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


def show_logs():
    print(subprocess.run("dmesg | tail -n 5", shell=True, stdout=subprocess.PIPE, text=True).stdout)
    for pattern in ("state/*/engine.log", "images/*.work/*.log", "*.runc.log", "out/*.err"):
        newest = sorted(glob.glob(f"{WORK}/{pattern}"), key=os.path.getmtime)[-1:]
        for path in newest:
            print(f"--- {path}")
            print(open(path, errors="replace").read()[-2500:])


GPU = gpu()
try:
    with open(os.path.join(HERE, "COMMIT")) as f:
        COMMIT = f.read().strip()
except FileNotFoundError:
    COMMIT = "unknown"
