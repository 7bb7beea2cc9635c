#!/usr/bin/env python3
"""Checks the licence and the source of every crate that is built into the product or its tests: each must offer a licence
of the list below, and come from the registry or this workspace. Prints the crates by licence."""
import collections
import json
import re
import subprocess
import sys

ALLOWED = {"Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Zlib", "0BSD", "Unlicense", "Unicode-3.0",
           "Apache-2.0 WITH LLVM-exception", "CC0-1.0", "BSL-1.0", "MIT-0"}


def offered(expression):
    """Whether an SPDX expression can be met with allowed licences (AND before OR, no nesting beyond one level)."""
    expression = expression.replace("/", " OR ")
    while True:
        inner = re.search(r"\(([^()]*)\)", expression)
        if not inner:
            break
        good = offered(inner.group(1))
        expression = expression.replace(inner.group(0), "Apache-2.0" if good else "none", 1)
    return any(all(part.strip() in ALLOWED for part in choice.split(" AND ")) for choice in expression.split(" OR "))


text = subprocess.run(["cargo", "metadata", "--format-version", "1", "--locked",
                       "--filter-platform", "x86_64-unknown-linux-gnu"], stdout=subprocess.PIPE, check=True).stdout
by_licence, bad = collections.defaultdict(list), []
for package in json.loads(text)["packages"]:
    licence, source = package["license"] or "", package["source"]
    by_licence[licence].append(f"{package['name']} {package['version']}")
    if not offered(licence):
        bad.append(f"{package['name']} {package['version']}: licence '{licence}' is not in the list")
    if source is not None and not source.startswith(("registry+", "sparse+")):
        bad.append(f"{package['name']} {package['version']}: comes from {source}, not from the registry")
for licence, crates in sorted(by_licence.items(), key=lambda item: -len(item[1])):
    print(f"{licence}: {', '.join(sorted(crates))}")
sys.exit("\n".join(bad) if bad else 0)
