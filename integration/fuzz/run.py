#!/usr/bin/env python3
"""Runs the fuzz targets one after the other: run.py SECONDS [TARGET...]. What they learn is minimised into corpus/TARGET, and
each run is recorded in ../results/fuzz.jsonl. An input that breaks a target stays in artifacts/ and ends this with status 1."""
import datetime
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "fuzz.jsonl"
BUILT = HERE / "target" / "x86_64-unknown-linux-gnu" / "release"
# Longest input of each target, bytes: what is longer only repeats itself.
LONGEST = {"manifest": 4096, "chunk_table": 512, "chain": 512, "message": 1024, "peer": 1024, "keeper": 4096, "args": 512,
           "spec": 4096, "config": 1024}


def git(*words):
    return subprocess.run(["git", *words], cwd=HERE, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def cpu():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def libfuzzer(target, folder, *words):
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        environment = dict(os.environ, TMPDIR=scratch)
        command = [BUILT / target, *words, "-rss_limit_mb=2048", "-malloc_limit_mb=512", "-timeout=20",
                   f"-artifact_prefix={HERE}/artifacts/{target}-"]
        return subprocess.run(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")


def run(target, seconds):
    kept, work = HERE / "corpus" / target, HERE / "target" / "corpus" / target
    for folder in (kept, work, HERE / "artifacts"):
        folder.mkdir(parents=True, exist_ok=True)
    before = cpu()
    ended = libfuzzer(target, work, f"-max_total_time={seconds}", f"-max_len={LONGEST[target]}", "-print_final_stats=1",
                      work, kept)
    used = cpu() - before
    executions = re.search(r"stat::number_of_executed_units: *(\d+)", ended.stderr)
    findings = int(ended.returncode != 0)
    if findings:
        print(ended.stderr[-6000:], file=sys.stderr)
    else:
        # The smallest set of inputs that reaches as much.
        with tempfile.TemporaryDirectory() as small:
            libfuzzer(target, small, "-merge=1", f"-max_len={LONGEST[target]}", small, kept, work)
            if any(pathlib.Path(small).iterdir()):
                for old in kept.iterdir():
                    old.unlink()
                for new in pathlib.Path(small).iterdir():
                    shutil.move(new, kept / new.name)
    figures = {"cpu_s": round(used, 1), "executions": int(executions[1]) if executions else 0,
               "corpus_files": sum(1 for _ in kept.iterdir()), "findings": findings}
    with RESULTS.open("a") as out:
        for metric, value in figures.items():
            line = {"bench": "fuzz", "workload": target, "system": "phos-runc", "metric": metric, "value": value, "stat": "sum",
                    "n": 1, "device": "simcuda", "driver": "", "commit": git("rev-parse", "--short", "HEAD"),
                    "date": datetime.date.today().isoformat(), "note": ""}
            out.write(json.dumps(line, separators=(",", ":")) + "\n")
    print(target, figures, flush=True)
    return findings


seconds = int(sys.argv[1])
found = sum(run(target, seconds) for target in sys.argv[2:] or LONGEST)
sys.exit(1 if found else 0)
