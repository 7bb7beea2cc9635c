#!/usr/bin/env python3
"""Runs the GPU tests and benchmarks of phos-runc from a bundle, on a machine with an NVIDIA GPU, root, cgroup v2 and
Python, but no packages. Results are JSON lines in the form that integration/results/ keeps; a table is printed last.

  runner.py torch [--gb 20] [--gb 2] [--plain]   PyTorch in a container: pause, restore, bit-identical or not
  runner.py models [--model M]... [--plain]      models in the shapes people run: the same, and incremental images
  runner.py matrix [--mode M]...                 frameworks and modes: bytes parked, bit-identical or not
  runner.py overhead [--load L]...               rates with and without libphos.so: steps, launches, allocations
  runner.py endurance                            PyTorch through --cycles leave-running checkpoints and a quarter as many stops
  runner.py podman                               PyTorch under Podman: checkpointed running, in place, restored
  runner.py killed                               the worker killed at --count points of a checkpoint: the program goes on
  runner.py faults                               the project's own CUDA program in three containers, faults for --seconds
  runner.py sample                               the project's own CUDA program: demo, then a soak of --cycles cycles
  runner.py copy                                 the copy pipeline by itself: digests, snapshot, rates to tmpfs and disk

Standard library only. Everything it makes lies below /run/phos-bench and is removed at the end.
"""
import argparse
import datetime
import json
import lzma
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

from compare import identical
from harness import BIN, COMMIT, ENV, GPU, HERE, OUT, PYTHON, WORK, Container, Driver, criu_bytes, log, longest_gap, result, rows, run, serve_driver, setup, show_logs, teardown, touch


def rate(steps, begin, end):
    """Steps per second between two times in ns."""
    inside = [t for _, _, t in steps if begin <= t <= end]
    return (len(inside) - 1) / ((inside[-1] - inside[0]) / 1e9) if len(inside) > 2 else None


# For so long before a checkpoint the program's rate is taken as the usual one, ns.
USUAL_NS = 2_000_000_000
# And for so long after it as the one that it comes back to, ns.
AFTER_NS = 1_000_000_000


def leave_running(box, workload, i, more=(), settle=30, keep=False, folder=f"{WORK}/images"):
    """One checkpoint of a running container; its figures, and the image."""
    image = f"{folder}/{box.name}-{i}"
    # Long enough to know the usual rate, and after whatever the last checkpoint still wrote.
    time.sleep(USUAL_NS / 1e9)
    before = time.monotonic_ns()
    box.usual = rate(box.steps(), before - USUAL_NS, before)
    box.checkpoint(image, True, *more)
    after = time.monotonic_ns()
    box.wait_steps(settle)
    time.sleep(max(0, AFTER_NS - (time.monotonic_ns() - after)) / 1e9)
    steps, report = box.steps(), box.report()
    report.pop("spans")
    gap, gap_begin, gap_end = max((b[2] - a[2], a[2], b[2]) for a, b in zip(steps, steps[1:]) if b[2] > before)
    gap /= 1e6
    log(f"{box.name} leave-running {i}: pause {gap:.0f} ms  " + " ".join(f"{k[:-3]} {v:.0f}" for k, v in report.items() if k.endswith("_ms"))
        + "  " + " ".join(f"{k[:-6]} {report[k] / 1e9:.2f} GB" for k in ("gpu_bytes", "written_bytes", "precopied_bytes", "dirty_bytes", "straight_bytes", "host_bytes", "host_ready_bytes"))
        + f"  criu {criu_bytes(image) / 1e9:.2f} GB")
    for w in report["warnings"]:
        log(f"  {w}")
    criu_gaps(image)
    # The image is written from the end of the gap to the command's end, with pre-copy also before the gap.
    for note, begin, end in (("pre-copy", before, gap_begin), ("while the image is written", gap_end, after), ("in the second after", after, after + AFTER_NS)):
        during = rate(steps, begin, end)
        if box.usual and during and (note != "pre-copy" or report["precopied_bytes"]):
            result("copy", workload, "phos-runc", "app_rate_during", during / box.usual, note=note + ", fraction of before")
            inside = [t for _, _, t in steps if begin <= t <= end]
            spans = [(b - a) / 1e6 for a, b in zip(inside, inside[1:])]
            parts = [spans[len(spans) * i // 4 : len(spans) * (i + 1) // 4] for i in range(4)]
            log(f"  steps/s before {box.usual:.2f}, {note} {during:.2f}, of {len(inside)} the slowest {max(spans):.2f} ms, the median {statistics.median(spans):.2f} ms, by quarters "
                + " ".join(f"{statistics.median(p):.2f}" for p in parts if p))
    if not keep:
        shutil.rmtree(image)
    return gap, report, image


def criu_gaps(image):
    """Shows where CRIU's time went: the longest stretches between two lines of its log."""
    try:
        with open(f"{image}.work/dump.log", errors="replace") as f:
            lines = [(float(line[1:10]), line[10:].strip()) for line in f if line.startswith("(")]
    except (OSError, ValueError):
        return
    gaps = sorted(((b[0] - a[0], a[1], b[1]) for a, b in zip(lines, lines[1:])), reverse=True)[:6]
    pages = [t for t, text in lines if "page-pipe" in text or "page-xfer" in text or "pagemap" in text]
    if lines and pages:
        log(f"  CRIU: {lines[-1][0] * 1e3:.0f} ms, memory from {pages[0] * 1e3:.0f} to {pages[-1] * 1e3:.0f}; " + "; ".join(f"{g * 1e3:.0f} ms after {a[:40]!r}" for g, a, _ in gaps))


def figures(workload, pauses):
    """The medians of some checkpoints."""
    for metric, keys in (("gpu_pause_ms", ("digest_ms", "snapshot_ms", "park_ms", "attach_ms")), ("driver_ms", ("driver_checkpoint_ms", "driver_restore_ms")), ("criu_ms", ("criu_ms",))):
        result("pause", workload, "phos-runc", metric, statistics.median(sum(r[k] for k in keys) for _, r in pauses), len(pauses), "median")
    result("pause", workload, "phos-runc", "pause_ms", statistics.median(p for p, _ in pauses), len(pauses), "median")
    copied = [r["written_bytes"] / 1e6 / r["copy_ms"] for _, r in pauses if r["copy_ms"]]
    result("copy", workload, "phos-runc", "copy_gb_s", statistics.median(copied), len(copied), "median", "tmpfs")


def stop_and_restore(box, workload, more=()):
    image = f"{WORK}/images/{box.name}-stop"
    box.checkpoint(image, False, *more)
    last = len(box.steps())
    report = box.report()
    report.pop("spans")
    log(f"{box.name} stopped at step {last}: {report['gpu_bytes'] / 1e9:.1f} GB on the GPU, {report}")
    begin = time.monotonic()
    box.restore(image)
    running = time.monotonic()
    box.wait_steps(1)
    first = time.monotonic()
    report = box.report()
    report.pop("spans")
    log(f"{box.name} restored in {running - begin:.2f} s, first step after {first - begin:.2f} s, report {report}")
    result("restore", workload, "phos-runc", "restore_ms", (running - begin) * 1e3, note="to running")
    result("restore", workload, "phos-runc", "restore_ms", (first - begin) * 1e3, note="to first result")
    result("restore", workload, "phos-runc", "load_gb_s", report["gpu_bytes"] / 1e6 / report["load_ms"], note="tmpfs")
    shutil.rmtree(image)


def resumes(box, image, workload):
    """The container goes on from an earlier image, taken while it ran; its steps are compared with those of the reference."""
    os.rename(box.log, box.log + ".first")
    os.unlink(f"{WORK}/out/{box.name}.stop")
    box.restore(image)
    box.wait_steps(5)
    box.stop()
    with open(f"{WORK}/out/reference-{box.name}.log") as f:
        expected = {int(line.split()[0]): line.split()[1] for line in f}
    compared = [(n, digest == expected[n]) for n, digest, _ in box.steps() if n in expected]
    same = bool(compared) and all(ok for _, ok in compared)
    log(f"{workload}: from {os.path.basename(image)} it went on at step {compared[0][0] if compared else '?'}, {len(compared)} steps compared, bit identical: {same}")
    result("restore", workload, "phos-runc", "bit_identical", same, len(compared), note="resumed from a leave-running image taken in mid-step")
    shutil.rmtree(image)


def idle_increment(box, workload):
    """Two images of a process that does nothing in between: the second one holds only what changed."""
    idle = f"{WORK}/out/idle"
    open(idle, "w").close()
    time.sleep(1)
    reports = []
    for i, more in enumerate(((), ("--parent-path", f"../{box.name}-idle-0"))):
        image = f"{WORK}/images/{box.name}-idle-{i}"
        box.checkpoint(image, True, *more)
        reports.append(box.report())
    for i in range(2):
        shutil.rmtree(f"{WORK}/images/{box.name}-idle-{i}")
    os.unlink(idle)
    box.wait_steps(1)
    result("copy", workload, "phos-runc", "image_bytes", reports[0]["written_bytes"], note="idle")
    result("copy", workload, "phos-runc", "increment_bytes", reports[1]["written_bytes"], note=f"idle; digest {reports[1]['digest_ms']:.1f} ms")
    log(f"{workload} idle: {reports[0]['written_bytes'] / 1e9:.2f} GB, then {reports[1]['written_bytes'] / 1e9:.3f} GB")


def huge_pages(box, workload):
    """One more checkpoint, to a tmpfs of huge pages."""
    folder = f"{WORK}/huge"
    os.makedirs(folder, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "huge=always,size=115g", "tmpfs", folder)
    gap, report, image = leave_running(box, workload, "huge", keep=True, folder=folder)
    result("pause", workload, "phos-runc", "criu_ms", report["criu_ms"], note="image on a tmpfs of huge pages")
    result("pause", workload, "phos-runc", "pause_ms", gap, note="image on a tmpfs of huge pages")
    shutil.copy(f"{image}.work/dump.log", os.path.join(OUT, "dump.log"))
    run("umount", folder)


def phos(gb, count, strategy, pause_only):
    workload = f"torch-{gb:g}g"
    box = Container(workload, ("torch_steps.py", "--gb", str(gb)), annotations={"phos.strategy": strategy})
    box.start()
    box.wait_steps(1200)
    pauses = []
    for i in range(count):
        gap, report, _ = leave_running(box, workload, i)
        pauses.append((gap, report))
        result("pause", workload, "phos-runc", "pause_ms", gap, note=f"leave-running {i}")
    figures(workload, pauses)
    huge_pages(box, workload)
    if pause_only:
        box.stop()
        return
    stop_and_restore(box, workload)
    box.wait_steps(60)
    box.stop()
    identical(box, workload)


# Workload, annotations, steps to warm up and to settle, whether incremental images are of interest.
MODELS = {
    "llama13b-infer": (("models.py", "--model", "llama13b-infer", "--idle", "/out/idle"), {}, 20, 10, True),
    "llama13b-train": (("models.py", "--model", "llama13b-train"), {}, 3, 2, False),
    "resnet-train": (("models.py", "--model", "resnet-train"), {}, 20, 5, False),
    "unet-infer": (("models.py", "--model", "unet-infer"), {}, 20, 10, False),
    "full-card": (("torch_steps.py", "--gb", "20"), {}, 60, 30, False),
}


def models(args):
    for workload in args.model or MODELS:
        words, annotations, warm, settle, incremental = MODELS[workload]
        balloon = None
        box = Container(workload, words, annotations=annotations)
        box.start()
        box.wait_steps(warm, 200)
        if workload == "full-card":
            # Something else takes what the container leaves free, but for 2 GB.
            code = "import torch,time\nfree=torch.cuda.mem_get_info()[0]\nx=torch.empty(free-2*10**9,dtype=torch.uint8,device='cuda')\nprint('full',flush=True)\ntime.sleep(600)"
            balloon = subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE, text=True)
            balloon.stdout.readline()
        pauses, images = [], []
        for i in range(args.count):
            for old in images:
                shutil.rmtree(old, ignore_errors=True)
            gap, report, image = leave_running(box, workload, i, settle=settle, keep=True)
            pauses.append((gap, report))
            images = [image]
        figures(workload, pauses)
        if args.pause_only:
            shutil.rmtree(images[-1])
            box.stop()
            if args.plain:
                plain(workload, words, warm, True)
            continue
        if incremental:
            # The next one builds on the last.
            last = os.path.basename(images[-1])
            gap, report, image = leave_running(box, workload, "increment", ("--parent-path", f"../{last}"), settle, keep=True)
            result("copy", workload, "phos-runc", "image_bytes", pauses[-1][1]["written_bytes"])
            result("copy", workload, "phos-runc", "increment_bytes", report["written_bytes"], note=f"of {report['gpu_bytes']}; pause {gap:.0f} ms, digest {report['digest_ms']:.1f} ms")
            shutil.rmtree(image)
            stop_and_restore(box, workload, ("--parent-path", f"../{last}"))
            shutil.rmtree(images.pop())
            idle_increment(box, workload)
        elif pauses[-1][1]["gpu_bytes"] < 45e9:
            stop_and_restore(box, workload)
        else:
            # Two images of this size do not fit: the running one is what is resumed from.
            log(f"{workload}: no stop, its image would not fit beside the other")
        box.wait_steps(settle)
        box.stop()
        if balloon:
            balloon.kill()
            balloon.wait()
        if args.plain and workload == "llama13b-infer":
            plain(workload, words, warm)
        identical(box, workload)
        if images:
            resumes(box, images[-1], workload)


def plain(workload, words, warm, pause_only=False):
    """The same container under runc, with the driver's own checkpoint of all GPU memory."""
    name = f"plain-{workload}"
    driver = Driver()
    box = Container(name, words, plain=True)
    box.start()
    box.wait_steps(warm, 200)
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
    if pause_only:
        box.stop()
        driver.close()
        return
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
        phos(gb, args.count, args.strategy, args.pause_only)
        if args.plain and gb == max(args.gb or [20.0]):
            plain(f"torch-{gb:g}g", ("torch_steps.py", "--gb", str(gb)), 60)


# Workload: program and options, environment.
MATRIX = {
    **{f"torch-{m}" if m != "eager" else "torch-eager": (("torch_modes.py", "--mode", m, "--gb", "2"), ()) for m in ("eager", "compile", "graphs", "expandable", "async")},
    "jax-prealloc": (("jax_steps.py", "--gb", "2"), ()),
    "jax": (("jax_steps.py", "--gb", "2"), ("XLA_PYTHON_CLIENT_PREALLOCATE=false",)),
    "cupy": (("cupy_steps.py", "--gb", "2"), ()),
    "triton": (("triton_steps.py", "--gb", "2"), ()),
    "numba": (("numba_steps.py", "--gb", "2"), ()),
    "torch-ipc": (("torch_ipc.py", "--gb", "2"), ()),
    # With threads that go on using host memory while the driver's state is away.
    "many-small": (("phos-sample", "--mib", "512", "--small", "100000", "--verify-every", "20", "--churn", "4"), ()),
}


def matrix(args):
    for workload in args.mode or MATRIX:
        words, env = MATRIX[workload]
        try:
            box = Container(workload, words, env=env)
            box.start()
            box.wait_steps(10, 120)
            gap, report, _ = leave_running(box, workload, 0, settle=5)
            parked, left = report["gpu_bytes"], report["driver_bytes"]
            result("coverage", workload, "phos-runc", "parked_fraction", parked / max(1, parked + left), note=f"{parked} bytes parked, {left} left to the driver")
            figures(workload, [(gap, report)])
            stop_and_restore(box, workload)
            box.wait_steps(5)
            box.stop()
            identical(box, workload, "coverage")
        except Exception as e:  # the other rows are still of interest
            log(f"{workload} FAILED: {e}")
            result("coverage", workload, "phos-runc", "bit_identical", 0, 0, note=f"failed: {str(e)[-300:]}")
            show_logs()
            subprocess.run([f"{BIN}/runc", "--root", f"{WORK}/runc", "delete", "--force", workload], stderr=subprocess.DEVNULL)


def sample(args):
    """The demo (every state compared with an uninterrupted run's), then many checkpoints and restores."""
    env = dict(ENV, PHOS_COMMIT=COMMIT, PHOS_DEVICE=GPU["name"])
    sandbox = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child", "--", f"{BIN}/sandbox-init"]
    shown = run(*sandbox, f"{BIN}/demo", env=env, timeout=120).stdout
    print(shown, flush=True)
    result("pause", "sample", "phos-runc", "bit_identical", "bit-identical to an uninterrupted run" in shown, note="demo")
    # Then with threads that change the address space while the driver's state is away, and with memory that two processes share.
    for cycles, more in (args.cycles, ()), (args.cycles // 2, ("--churn", "4")), (args.cycles // 5, ("--pair",)):
        done = run(*sandbox, f"{BIN}/soak", str(max(5, cycles)), *more, env=env, timeout=280)
        rows.extend(dict(json.loads(line), driver=GPU["driver"]) for line in done.stdout.splitlines())


def faults(args):
    """Three containers at a time, faults at random times; the program is built with the places where they are made."""
    import endurance

    built = f"{WORK}/faults"
    shutil.copytree(BIN, built)
    with lzma.open(f"{HERE}/phos-runc-faults.xz") as packed, open(f"{built}/phos-runc", "wb") as program:
        shutil.copyfileobj(packed, program)
    env = dict(ENV, PHOS_COMMIT=COMMIT, PHOS_DEVICE=GPU["name"], TMPDIR=WORK)
    before = endurance.gpu_used()
    words = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child", "--", f"{BIN}/sandbox-init", f"{built}/fault-soak"]
    with open(os.path.join(OUT, "faults.log"), "w") as told:
        done = subprocess.run([*words, str(args.seconds), str(args.seed)], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=told, text=True, timeout=args.seconds + 200)
    rows.extend(dict(json.loads(line), driver=GPU["driver"]) for line in done.stdout.splitlines())
    time.sleep(2)
    result("soak", "sample-faults", "phos-runc", "gpu_growth_bytes", endurance.gpu_used() - before, note="after all containers are gone")
    with open(os.path.join(OUT, "faults.log")) as told:
        lines = told.read().splitlines()
    log("\n".join(line for line in lines[-4000:] if "WRONG" in line or "LOST" in line or "not reached" not in line and " s  " in line)[-6000:])
    if done.returncode:
        raise RuntimeError("\n".join(lines[-12:]))


def copy(args):
    """The copy pipeline by itself."""
    folders = f"{WORK}/copy", os.path.join(args.disk, "phos-copy")
    words = [f"{BIN}/copy-bench", "--gb", str((args.gb or [8.0])[0]), "--sweep"] + [w for f in folders for w in ("--folder", f)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=280)
    for line in done.stdout.splitlines():
        row = json.loads(line)
        row.update(commit=COMMIT, date=datetime.date.today().isoformat())
        rows.append(row)
    if done.returncode:
        raise RuntimeError(f"copy-bench ended with {done.returncode}")


def overhead(args):
    import rates

    rates.run(args)


def endurance(args):
    import endurance

    endurance.cycles(args)


def podman(args):
    import podman

    podman.flow(args)


def killed(args):
    import endurance

    endurance.killed(args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["torch", "models", "matrix", "sample", "faults", "copy", "overhead", "endurance", "killed", "podman", "driver"])
    parser.add_argument("--gb", type=float, action="append")
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--mode", action="append", choices=list(MATRIX))
    parser.add_argument("--disk", default="/var/tmp", help="a folder on a disk")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--seconds", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--load", action="append", choices=["llama13b-infer", "resnet-train", "torch-2g", "calls"])
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--pause-only", action="store_true", help="models: neither restore nor compare")
    args = parser.parse_args()
    if args.what == "driver":
        serve_driver()
        sys.exit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    status = 0
    setup()
    try:
        touch()
        globals()[args.what](args)
    except Exception as e:  # the figures so far are kept
        status = 1
        log(f"FAILED: {e}")
        show_logs()
    finally:
        for name in os.listdir(f"{WORK}/runc") if os.path.isdir(f"{WORK}/runc") else []:
            subprocess.run([f"{BIN}/runc", "--root", f"{WORK}/runc", "delete", "--force", name], stderr=subprocess.DEVNULL)
        with open(os.path.join(OUT, f"{args.what}.jsonl"), "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)
        teardown()
    for r in rows:
        print(f"{r['bench']:9} {r['workload']:11} {r['system']:10} {r['metric']:15} {r['value']:>12} {r['note']}")
    sys.exit(status)
