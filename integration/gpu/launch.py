#!/usr/bin/env python3
"""What calls cost with libphos.so in front of the driver and without: empty launches and allocations of phos-sample,
alternating, no container. Prints a table and writes launch.jsonl.

  launch.py [--launches 200000] [--count 11]
"""
import argparse
import json
import os
import statistics
import subprocess
import tempfile

from harness import BIN, DRIVER, OUT, log, result, rows

parser = argparse.ArgumentParser()
parser.add_argument("--launches", type=int, default=200000)
parser.add_argument("--count", type=int, default=11)
args = parser.parse_args()


def once(with_library, folder):
    env = dict(os.environ, LD_LIBRARY_PATH=f"{DRIVER}/lib64")
    if with_library:
        control = os.path.join(folder, "control")
        os.makedirs(control, exist_ok=True)
        # The library thinks it stands where the driver was, and that a host may call.
        env.update(LD_LIBRARY_PATH=f"{folder}:{DRIVER}/lib64", PHOS_REAL_LIBCUDA=f"{DRIVER}/lib64/libcuda.so.1", PHOS_CONTROL_DIR=control)
    text = subprocess.run([f"{BIN}/phos-sample", "--bench", str(args.launches)], env=env, check=True, capture_output=True, text=True, timeout=120).stdout
    return {name: float(ns) for name, ns in map(str.split, text.splitlines())}


with tempfile.TemporaryDirectory() as folder:
    os.symlink(f"{BIN}/libphos.so", f"{folder}/libcuda.so.1")
    runs = {True: [], False: []}
    for i in range(args.count):
        for with_library in runs:
            runs[with_library].append(once(with_library, folder))
            log(f"{i} {'with' if with_library else 'without'}: {runs[with_library][-1]}")
for name in runs[True][0]:
    ns = {system: statistics.median(r[name] for r in values) for system, values in runs.items()}
    workload = "empty-kernels" if name == "launch_ns" else name.removesuffix("_ns").replace("_", "-")
    note = f"{ns[False]:.0f} ns without, {ns[True]:.0f} ns with libphos.so"
    result("overhead", workload, "phos-runc", "rate_fraction", ns[False] / ns[True], args.count, "median", note)
    result("overhead", workload, "phos-runc", "added_ns", ns[True] - ns[False], args.count, "median", note)
with open(os.path.join(OUT, "launch.jsonl"), "w") as f:
    f.writelines(json.dumps(r) + "\n" for r in rows)
for r in rows:
    print(f"{r['workload']:18} {r['metric']:14} {r['value']:>10} {r['note']}")
