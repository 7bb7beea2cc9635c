"""The same program again and again: hundreds of checkpoints and restores, and workers that are killed in the middle."""
import os
import random
import shutil
import signal
import subprocess
import time

from compare import identical
from harness import CARD, ENV, WORK, Container, log, result, run

SEED = 1


def gpu_used():
    """Bytes of the GPU that are in use."""
    out = run("nvidia-smi", "-i", str(CARD), "--query-gpu=memory.used", "--format=csv,noheader,nounits", env=dict(os.environ)).stdout
    return int(out) << 20


def resident(pid):
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmRSS"))


def growth(values):
    """From the first tenth's largest to the last tenth's largest."""
    part = max(1, len(values) // 10)
    return max(values[-part:]) - max(values[:part])


def cycles(args):
    """--cycles leave-running checkpoints, a quarter as many stops and restores in between, at random times; every step is compared."""
    choose = random.Random(SEED)
    box = Container("torch-1g", ("torch_steps.py", "--gb", "1", "--step-ms", "25"))
    box.start()
    box.wait_steps(30)
    used, rss, pauses, failures = [], [], [], 0
    kinds = ["leave"] * args.cycles + ["stop"] * (args.cycles // 4)
    choose.shuffle(kinds)
    for n, kind in enumerate(kinds):
        time.sleep(choose.random() * 0.2)
        image = f"{WORK}/images/{n}"
        before = len(box.steps())
        try:
            box.checkpoint(image, kind == "leave")
            if kind == "stop":
                box.restore(image)
            else:
                pauses.append(box.report()["pause_ms"])
            box.wait_steps(2, 30)
        except Exception as e:
            failures += 1
            log(f"cycle {n} ({kind}) FAILED after step {before}: {e}")
            if box.status() != "running":
                break
        # Asking takes half a second.
        if n % 5 == 0:
            used.append(gpu_used())
        rss.append(resident(box.pid()))
        shutil.rmtree(image, ignore_errors=True)
        shutil.rmtree(image + ".work", ignore_errors=True)
        if n % 50 == 0:
            log(f"cycle {n}: GPU {used[-1] >> 20} MiB, program {rss[-1] >> 20} MiB")
    result("soak", "torch-1g", "phos-runc", "cycles", len(rss), note=f"{kinds.count('leave')} leave-running, {kinds.count('stop')} stop and restore, shuffled")
    result("soak", "torch-1g", "phos-runc", "failures", failures)
    result("soak", "torch-1g", "phos-runc", "rss_growth_bytes", growth(rss), len(rss), note="last tenth's largest less the first tenth's")
    result("soak", "torch-1g", "phos-runc", "gpu_growth_bytes", growth(used), len(used), note="last tenth's largest less the first tenth's")
    for name, value in (("median", sorted(pauses)[len(pauses) // 2]), ("max", max(pauses))):
        result("soak", "torch-1g", "phos-runc", "pause_ms", value, len(pauses), name)
    box.stop()
    identical(box, "torch-1g", "soak")


def worker():
    """The process id of this runner's checkpoint worker, if there is one."""
    out = subprocess.run(["pgrep", "-f", f"__worker checkpoint {WORK}/state"], stdout=subprocess.PIPE, text=True).stdout.split()
    return int(out[0]) if out else None


def killed(args):
    """Kills the worker of a leave-running checkpoint at --count moments, from its beginning to its end."""
    box = Container("torch-2g", ("torch_steps.py", "--gb", "2", "--step-ms", "5"))
    box.start()
    box.wait_steps(100)
    # The first one takes longer than those that follow.
    box.checkpoint(f"{WORK}/images/first", True)
    begin = time.monotonic()
    box.checkpoint(f"{WORK}/images/whole", True)
    whole = time.monotonic() - begin
    log(f"an undisturbed checkpoint takes {whole:.2f} s")
    lost = goes_on = 0
    for n in range(args.count):
        image, at = f"{WORK}/images/killed-{n}", whole * (n + 0.5) / args.count
        words = [box.program, "--root", f"{WORK}/runc", "--log", f"{WORK}/killed.log", "checkpoint", "--leave-running", "--image-path", image,
                 "--work-path", image + ".work", box.name]
        os.makedirs(image + ".work")
        process = subprocess.Popen(words, env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        time.sleep(at)
        pid = worker()
        if pid:
            os.kill(pid, signal.SIGKILL)
        said = process.communicate(timeout=120)[0].strip()
        try:
            box.wait_steps(20, 60)
            goes_on += 1
        except RuntimeError:
            lost += 1
        complete = os.path.exists(f"{image}/phos.json")
        log(f"killed at {at:.2f} s ({f'worker {pid}' if pid else 'it was over'}): status {process.returncode}, image {'complete' if complete else 'none'}: {said[-160:]}")
        if process.returncode and complete:
            lost += 1
        shutil.rmtree(image, ignore_errors=True)
        if lost:
            break
    result("faults", "torch-2g", "phos-runc", "points", args.count, note="SIGKILL of the worker, spread over a leave-running checkpoint")
    result("faults", "torch-2g", "phos-runc", "outcomes", goes_on, note="the program went on")
    result("faults", "torch-2g", "phos-runc", "lost", lost)
    box.checkpoint(f"{WORK}/images/after", False)
    box.restore(f"{WORK}/images/after")
    box.wait_steps(20)
    box.stop()
    identical(box, "torch-2g", "faults")
