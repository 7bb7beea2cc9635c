#!/usr/bin/env python3
"""Prints all measured figures as Markdown, one table for each benchmark: figures.py FILE.jsonl…"""
import json
import sys
from pathlib import Path

TITLES = {"pause": "How long a program stands still", "copy": "Copying", "restore": "Restore", "overhead": "Cost while nothing is checkpointed",
          "coverage": "What is parked, and whether the results are the same", "start": "Starting", "faults": "Faults", "soak": "Endurance"}


def number(value):
    return f"{value:,.3f}".rstrip("0").rstrip(".").replace(",", " ")


def rows():
    for path in map(Path, sys.argv[1:]):
        for line in path.read_text().splitlines():
            yield path.stem, json.loads(line)


def main():
    by_bench = {}
    for name, row in rows():
        by_bench.setdefault(row["bench"], []).append((row["workload"], row["system"], row["metric"], name, row))
    print("# Measured figures\n\nMade by `make plot` from `integration/results/`, where `FILE.jsonl` holds the raw lines. `plain` is runc and CRIU with the driver's own")
    print("checkpoint, `runc` the lower runtime alone, `simcuda` the simulated driver.")
    for bench, found in sorted(by_bench.items(), key=lambda item: [*TITLES, item[0]].index(item[0])):
        print(f"\n## {TITLES.get(bench, bench)}\n\n| workload | system | metric | value | n | what | device | file |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
        for workload, system, metric, name, row in sorted(found, key=lambda f: f[:4]):
            stat = row["stat"] if row["stat"] != "single" else ""
            note = ", ".join(filter(None, (stat, row["note"]))).replace("|", "\\|").replace("\n", " ")
            print(f"| {workload} | {system} | {metric} | {number(row['value'])} | {row['n']} | {note} | {row['device'].removeprefix('NVIDIA ')} | {name} |")


main()
