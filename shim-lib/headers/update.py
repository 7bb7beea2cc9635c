#!/usr/bin/env python3
"""Extracts from NVIDIA's headers what `entry-points.txt` is compared with: the names of all functions and how many
arguments each has, one list for each version of CUDA. Fetches the headers with pip (the nvidia-cuda-runtime wheels).

  update.py                 every version that is listed here already
  update.py 13.6.12 …       these as well
"""
import os
import re
import subprocess
import sys
import tempfile
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))


def header(version):
    """cuda.h of a version."""
    major = int(version.split(".")[0])
    package = "nvidia-cuda-runtime" + (f"-cu{major}" if major < 13 else "")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
                        "--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64", "-d", folder,
                        f"{package}=={version}"], check=True)
        with zipfile.ZipFile(os.path.join(folder, os.listdir(folder)[0])) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith("/include/cuda.h"))
            return wheel.read(name).decode()


def functions(text):
    """Arguments by name, under the names that the linker sees."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S).replace("\\\n", " ")
    # `#define cuX cuX_v2` or `#define cuX __CUDA_API_PTSZ(cuX_v2)`: what is declared as cuX is exported as that, and with
    # the suffix as well. Further down the definitions are undone, and the older functions declared by their own names.
    renamed = {}
    for name, kind, target in re.findall(r"^\s*#\s*define\s+(cu\w+)\s+(?:__CUDA_API_(PTSZ|PTDS)\()?(cu\w+)\)?\s*$", text, flags=re.M):
        renamed.setdefault(name, set()).update({target, f"{target}_{kind.lower()}"} if kind else {target})
    undone = re.search(r"^\s*#\s*undef\s+cu[A-Z]", text, flags=re.M)
    found = {}
    for match in re.finditer(r"\bCUDAAPI\s+(cu[A-Z]\w*)\s*\(([^;]*)\)\s*;", text):
        name, arguments = match[1], match[2].strip()
        depth, count = 0, 0 if arguments in ("", "void") else 1
        for c in arguments:
            depth += (c == "(") - (c == ")")
            count += c == "," and depth == 0
        early = undone is None or match.start() < undone.start()
        for exported in renamed.get(name, {name}) if early else {name}:
            found[exported] = count
    return found


for version in sorted({f[:-4] for f in os.listdir(HERE) if f.endswith(".txt")} | set(sys.argv[1:])):
    found = functions(header(version))
    with open(os.path.join(HERE, f"{version}.txt"), "w") as out:
        out.writelines(f"{name} {count}\n" for name, count in sorted(found.items()))
    print(f"{version}: {len(found)} functions")
