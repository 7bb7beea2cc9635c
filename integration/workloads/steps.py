"""What the GPU workloads have in common: options, and one line a step.

Every workload computes with integers (in float32 where matrix products need it, small enough to be exact), so that its
digests depend on no algorithm a library chooses, and a run can be compared with any other run to the last bit.
"""
import argparse
import hashlib
import os
import time

N = 2048  # side of the matrices; values stay below MOD, and N * MOD**2 below 2**24
MOD = 61
FACTOR, ADD = 1664525, 1013904223  # a linear congruential generator, modulo 2**32
SLABS = 8  # the large state is updated one slab a step


def options(**more):
    """Parses the options; `more` maps further option names to what add_argument takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=2.0, help="GPU memory to hold, 1e9 bytes")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many; 0: go on until --stop exists")
    parser.add_argument("--out", required=True)
    parser.add_argument("--stop", default="", help="end when this file exists")
    for name, words in more.items():
        parser.add_argument("--" + name, **words)
    args = parser.parse_args()
    args.words = max(N * N, int(args.gb * 1e9 / SLABS / 4) // N * N)  # 32-bit words of one slab
    return args


def run(args, advance):
    """Calls `advance(step)`, which returns the step's result as a NumPy array, and writes `step digest monotonic_ns`.

    The file is opened and closed for each line: a checkpointed program must not hold a file whose length changes behind
    its back.
    """
    step = 0
    while (args.steps == 0 or step < args.steps) and not (args.stop and os.path.exists(args.stop)):
        digest = hashlib.sha256(advance(step).tobytes()).hexdigest()[:16]
        with open(args.out, "a") as out:
            out.write(f"{step} {digest} {time.monotonic_ns()}\n")
        step += 1
