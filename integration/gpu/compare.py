"""Whether a container's steps are those of an uninterrupted run."""
import os

from harness import CARD, HERE, PYTHON, WORK, log, result, run


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


def reference(box, steps):
    """The same workload without any container, for as many steps."""
    path = f"{WORK}/out/reference-{box.name}.log"
    env = dict(os.environ, CUDA_VISIBLE_DEVICES=str(CARD), **dict(e.split("=", 1) for e in box.env))
    run(PYTHON, f"{HERE}/workloads/{box.workload[0]}", *box.workload[1:], *(["--step-ms", "0"] if "--step-ms" in box.workload else []), "--steps", str(steps), "--out", path, env=env, timeout=280)
    with open(path) as f:
        return [(int(a), b, int(c)) for a, b, c in map(str.split, f)]


def identical(box, workload, bench="pause"):
    steps = box.steps()
    same, compared = compare(steps, reference(box, len(steps)))
    log(f"{workload}: {len(steps)} steps, {compared} compared, bit identical: {same}")
    result(bench, workload, "phos-runc", "bit_identical", same, compared, note="steps compared with an uninterrupted run")
