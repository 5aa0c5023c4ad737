"""Compile ``csrc/cuda/*.cu`` to cubins inside the package; everything else stands in pyproject.toml.

nvcc (through ninja) is taken where a CUDA toolkit is found, else NVRTC where that is installed. With neither, the
package ships the sources alone and says so: a missing cubin is compiled on the machine that needs it.
"""

import ctypes
import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc" / "cuda"
# Machine code for the GPUs we tune for, and PTX that the driver can compile for any newer one.
TARGETS = {"sm_80.cubin": "sm_80", "sm_90a.cubin": "sm_90a", "compute_80.ptx": "compute_80"}
NVRTC_NAMES = ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so")


def find_nvcc():
    """Return the path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidate = Path(home) / "bin" / "nvcc" if home else None
    return str(candidate) if candidate and candidate.exists() else shutil.which("nvcc")


def compile_with_nvcc(nvcc, sources, folder):
    """Compile every source for every target with nvcc, in parallel, through a generated build.ninja."""
    lines = [f"nvcc = {nvcc}", f"flags = -std=c++17 -O3 -I {SOURCES}"]
    for suffix, target in TARGETS.items():
        kind = "--cubin" if suffix.endswith("cubin") else "--ptx"
        lines += [f"rule {suffix}", f"  command = $nvcc $flags -arch={target} {kind} -MD -MF $out.d -o $out $in"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
        lines += [f"build {source.stem}.{suffix}: {suffix} {source}" for source in sources]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    try:
        subprocess.run(["ninja", "-C", str(folder)], check=True)
    finally:
        for left_over in (*folder.glob(".ninja*"), folder / "build.ninja"):
            left_over.unlink()


def find_nvrtc():
    """Return NVRTC's library, from the system or from NVIDIA's Python packages, or None."""
    packaged = [found for entry in sys.path for found in Path(entry or ".").glob("nvidia/**/libnvrtc.so.*")]
    for name in (*map(str, packaged), *NVRTC_NAMES):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def compile_with_nvrtc(nvrtc, sources, folder):
    """Compile every source for every target with NVRTC, one after the other."""
    for source in sources:
        for suffix, target in TARGETS.items():
            kind = "CUBIN" if suffix.endswith("cubin") else "PTX"
            (folder / f"{source.stem}.{suffix}").write_bytes(nvrtc_compile(nvrtc, source, target, kind))


def nvrtc_compile(nvrtc, source, target, kind):
    """Compile one source for one target; `kind` is CUBIN or PTX. The compiler's own words become the error."""
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    options = [f"-arch={target}".encode(), b"-std=c++17", f"-I{SOURCES}".encode()]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    wanted = "ProgramLog" if status else kind
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{wanted}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{wanted}")(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise RuntimeError(f"NVRTC could not compile {source.name} for {target}:\n{text.value.decode()}")
    return text.raw


def compile_kernels(folder):
    """Fill `folder` with the compiled kernels and return how that was done, in words."""
    sources = sorted(SOURCES.glob("*.cu"))
    if not sources:
        return "there is no CUDA source to compile"
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = find_nvcc()
    if nvcc and shutil.which("ninja"):
        compile_with_nvcc(nvcc, sources, folder)
        return f"compiled {len(sources)} CUDA sources with {nvcc}"
    nvrtc = find_nvrtc()
    if nvrtc:
        compile_with_nvrtc(nvrtc, sources, folder)
        return f"compiled {len(sources)} CUDA sources with NVRTC"
    return "neither nvcc with ninja nor NVRTC was found: shipping the CUDA sources only"


class BuildWithKernels(build_py):
    """Compile the kernels into the package, and put their sources beside them in a wheel."""

    def run(self):
        super().run()
        package = ROOT / "fusedops" if self.editable_mode else Path(self.build_lib) / "fusedops"
        print("fusedops:", compile_kernels(package / "_cubin"))
        if not self.editable_mode:
            shutil.copytree(SOURCES, package / "_csrc", dirs_exist_ok=True)


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithKernels})
