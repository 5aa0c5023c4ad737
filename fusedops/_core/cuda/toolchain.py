"""The compilers of CUDA sources, nvcc and NVRTC; setup.py loads this file too, so it imports the standard library only.

What is made of a source is named by what it is for: ``sm_80.cubin``, ``sm_90a.cubin``, ``sm_80.ptx``.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ("-std=c++17", "-O3")
NVRTC_FLAGS = ("-std=c++17",)  # it optimises fully and knows no -O3
LINES = "-lineinfo"  # what the emulator runs says which line an instruction is from; what is shipped does not
SHIPPED = ("sm_80.cubin", "sm_90a.cubin", "sm_80.ptx")
_NVRTC_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def fingerprint(source):
    """A hash of all that a compilation of a source follows from: itself, the headers beside it, the flags."""
    digest = hashlib.sha256(" ".join((*FLAGS, *NVRTC_FLAGS, LINES)).encode())
    for path in (source, *sorted(source.parent.glob("*.cuh"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def find_nvcc():
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidate = Path(home) / "bin" / "nvcc" if home else None
    return str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")


def find_nvrtc():
    """NVRTC's library, from NVIDIA's Python packages or from the system, or None."""
    packaged = [found for entry in sys.path for found in Path(entry or ".").absolute().glob("nvidia/**/libnvrtc.so.*")]
    for path in (*sorted(packaged), *map(Path, _NVRTC_NAMES)):
        try:
            for part in path.parent.glob("libnvrtc-builtins.so.*") if path.is_absolute() else ():
                ctypes.CDLL(str(part))  # NVRTC asks for it by its name, which the loader then knows
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None


def found():
    """The compiler that would be used, in words, or None."""
    nvcc = find_nvcc()
    nvrtc = None if nvcc else find_nvrtc()
    return described(nvcc, nvrtc) if nvcc or nvrtc else None


def described(nvcc, nvrtc):
    """A compiler in words: of NVRTC its version, else the release that nvcc tells."""
    if nvrtc is not None:
        numbers = ctypes.c_int(), ctypes.c_int()
        nvrtc.nvrtcVersion(*map(ctypes.byref, numbers))
        return f"NVRTC {numbers[0].value}.{numbers[1].value}"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release ([\d.]+)", told)
    return f"nvcc {release[1] if release else ''}".strip()


def nvcc_options(product):
    """What nvcc is told for a product, such as ``sm_90a.cubin``."""
    target, kind = product.split(".")
    return [f"-arch={target}", "--cubin"] if kind == "cubin" else [f"-arch={_virtual(target)}", "--ptx"]


def compile_source(source, product):
    """The bytes of one product of a source; PTX names the source's lines.

    Raises:
        RuntimeError: there is no compiler, or the compiler's own words.
    """
    nvcc = find_nvcc()
    if nvcc:
        return _with_nvcc(nvcc, source, product)
    nvrtc = find_nvrtc()
    if nvrtc is None:
        raise RuntimeError(f"cuda: {source.name} cannot be compiled for {product}: neither nvcc nor NVRTC was found")
    return compile_with_nvrtc(nvrtc, source, product, *_lines(product))


def _with_nvcc(nvcc, source, product):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / product
        command = [nvcc, *FLAGS, *nvcc_options(product), *_lines(product), source.name, "-o", out]
        done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"cuda: nvcc could not compile {source.name} for {product}:\n{done.stderr or done.stdout}"
            )
        return out.read_bytes()


def compile_with_nvrtc(nvrtc, source, product, *extra):
    """One product of a source by NVRTC. RuntimeError: the compiler's own words."""
    target, kind = product.split(".")
    arch = target if kind == "cubin" else _virtual(target)
    options = [option.encode() for option in (*NVRTC_FLAGS, f"-arch={arch}", f"-I{source.parent}", *extra)]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        wanted = "ProgramLog" if status else kind.upper()
        getattr(nvrtc, f"nvrtcGet{wanted}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{wanted}")(program, text)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise RuntimeError(f"cuda: NVRTC could not compile {source.name} for {product}:\n{text.value.decode()}")
    return text.raw if kind == "cubin" else text.value


def _lines(product):
    return [LINES] if product.endswith(".ptx") else []


def _virtual(target):
    return target.replace("sm_", "compute_")
