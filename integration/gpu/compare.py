"""Whether a container's steps are those of an uninterrupted run."""
import os

from harness import CARD, HERE, PYTHON, WORK, log, result, run, steps_in


def compare(steps, reference):
    """1 if none of the steps is missing or came twice, and every one that the reference has is the same."""
    numbers = [s[0] for s in steps]
    strides = {b - a for a, b in zip(numbers, numbers[1:])}
    if len(strides) != 1 or min(strides) < 1:
        log(f"steps are not contiguous: {sorted(strides)}")
        return 0, 0
    expected = {number: digest for number, digest, _ in reference}
    known = [(number, digest) for number, digest, _ in steps if number in expected]
    wrong = [number for number, digest in known if digest != expected[number]]
    if wrong:
        log(f"first wrong step {wrong[0]}")
    return int(bool(known) and not wrong), len(known)


def reference(box, steps):
    """The same workload without any container, up to its last step."""
    path = f"{WORK}/out/reference-{box.name}.log"
    env = dict(os.environ, CUDA_VISIBLE_DEVICES=str(CARD), **dict(e.split("=", 1) for e in box.env))
    program, *options = box.workload
    start = [PYTHON, f"{HERE}/workloads/{program}"] if program.endswith(".py") else [f"{HERE}/bin/{program}"]
    hurry = ["--step-ms", "0"] if "--step-ms" in options or program == "phos-sample" else []
    run(*start, *options, *hurry, "--steps", str(steps), "--out", path, env=env, timeout=280)
    return steps_in(path)


def identical(box, workload, bench="pause"):
    steps = box.steps()
    same, compared = compare(steps, reference(box, steps[-1][0] + 1))
    log(f"{workload}: {len(steps)} steps, {compared} compared, bit identical: {same}")
    result(bench, workload, "phos-runc", "bit_identical", same, compared, note="steps compared with an uninterrupted run")
