#!/usr/bin/env python3
"""Checks the licence and the source of every crate that is built into the product or its tests: each must offer a licence
of the list below, come from the registry or this workspace, and none is banned. Prints the crates by licence, or writes
contrib/docs/licences.md (--write)."""
import collections
import json
import pathlib
import re
import subprocess
import sys

ALLOWED = {"Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Zlib", "0BSD", "Unlicense", "Unicode-3.0",
           "Apache-2.0 WITH LLVM-exception", "CC0-1.0", "BSL-1.0", "MIT-0"}

# What the product does without: other people's TLS, and runtimes beside tokio.
BANNED = {"openssl", "openssl-sys", "native-tls", "async-std", "smol"}
DOC = pathlib.Path(__file__).resolve().parents[2] / "contrib" / "docs" / "licences.md"


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
    if package["name"] in BANNED:
        bad.append(f"{package['name']} {package['version']}: is banned")
    for dependency in package["dependencies"] if source is None else ():
        if dependency["req"] == "*" and not dependency.get("path"):
            bad.append(f"{package['name']}: takes any version of {dependency['name']}")
    if source is not None and not source.startswith(("registry+", "sparse+")):
        bad.append(f"{package['name']} {package['version']}: comes from {source}, not from the registry")
listed = [(licence, ", ".join(sorted(crates))) for licence, crates in
          sorted(by_licence.items(), key=lambda item: (-len(item[1]), item[0]))]
if sys.argv[1:] == ["--write"]:
    rows = "\n".join(f"| {licence} | {crates} |" for licence, crates in listed)
    DOC.write_text(f"""# Crates and their licences

Every crate that is built into the product or its tests, by `make licences`. Each offers a licence that goes with Apache-2.0 and
comes from the registry or from this workspace.

`make deny` holds the same lists against all features with cargo-deny 0.20.2 (`integration/deny.toml`): bans, licences and
sources are in order. One exception is granted: `pathrs` (MPL-2.0), which only `--features libcontainer` builds in, unchanged.
Advisories are checked where their database can be reached.

| licence | crates |
| --- | --- |
{rows}
""")
else:
    for licence, crates in listed:
        print(f"{licence}: {crates}")
sys.exit("\n".join(bad) if bad else 0)
