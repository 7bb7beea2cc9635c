#!/usr/bin/env python3
"""Compiles the CUDA sources given as arguments to PTX beside them, with NVRTC 12.4, whose PTX every driver from 550 on
accepts.

Needs no GPU. The compiler comes from PyPI (nvidia-cuda-nvrtc-cu12) into a temporary environment, unless NVRTC names its
library.
"""
import ctypes
import glob
import os
import subprocess
import sys
import tempfile
import venv


def compile_ptx(library, path):
    with open(path, "rb") as file:
        source = file.read()
    nvrtc = ctypes.CDLL(library)
    program = ctypes.c_void_p()
    code = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, path.encode(), 0, None, None)
    options = [b"--gpu-architecture=compute_70", b"--std=c++17"]
    code = code or nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    if code:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, text)
        sys.exit(text.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, text)
    return text.value


with tempfile.TemporaryDirectory() as folder:
    library = os.environ.get("NVRTC")
    if not library:
        venv.create(folder, with_pip=True)
        subprocess.run([f"{folder}/bin/pip", "install", "-q", "nvidia-cuda-nvrtc-cu12==12.4.127"], check=True)
        library = glob.glob(f"{folder}/lib/python*/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12")[0]
    for path in sys.argv[1:]:
        ptx = compile_ptx(library, path)
        with open(os.path.splitext(path)[0] + ".ptx", "wb") as out:
            out.write(ptx)
