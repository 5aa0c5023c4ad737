"""Compile ``csrc/cuda/*.cu`` to cubins inside the package; everything else stands in pyproject.toml.

nvcc (through ninja) is taken where a CUDA toolkit is found, else NVRTC where that is installed. With neither, the
package ships sources and the PTX beside them, and says so: a missing cubin is compiled where it is needed.
"""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc" / "cuda"
WORK = ROOT / "build" / "kernels"  # kept between builds, so that ninja compiles what has changed


def load_toolchain():
    """`fusedops._core.cuda.toolchain` by its path: the package needs torch, which a build does not have."""
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "fusedops" / "_core" / "cuda" / "toolchain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = load_toolchain()


def find_ninja():
    """The command of ninja: of its Python package, which an isolated build installs, or of the system; else None."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja")


def compile_with_nvcc(nvcc, ninja, sources, folder):
    """Compile every product of every source with nvcc, in parallel, through a generated build.ninja."""
    WORK.mkdir(parents=True, exist_ok=True)
    flags = " ".join(toolchain.FLAGS)
    lines = ["ninja_required_version = 1.5", f"nvcc = {_escaped(nvcc)}", f"flags = {flags}"]
    for product in toolchain.SHIPPED:
        options = " ".join(toolchain.nvcc_options(product))
        lines += [f"rule {product}", f"  command = $nvcc $flags {options} -MD -MF $out.d -o $out $in"]
        lines += ["  description = nvcc $out", "  depfile = $out.d", "  deps = gcc"]
        lines += [f"build {source.stem}.{product}: {product} {_escaped(source)}" for source in sources]
    (WORK / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([ninja, "-C", str(WORK)], check=True)
    for source in sources:
        for product in toolchain.SHIPPED:
            shutil.copy2(WORK / f"{source.stem}.{product}", folder)


def _escaped(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compile_with_nvrtc(nvrtc, sources, folder):
    """Compile every product of every source with NVRTC, one after the other."""
    for source in sources:
        for product in toolchain.SHIPPED:
            print(f"NVRTC {source.stem}.{product}", flush=True)
            (folder / f"{source.stem}.{product}").write_bytes(toolchain.compile_with_nvrtc(nvrtc, source, product))


def compile_kernels(folder):
    """Fill `folder` with the compiled kernels and return how that was done, in words."""
    shutil.rmtree(folder, ignore_errors=True)
    sources = sorted(SOURCES.glob("*.cu"))
    if not sources:
        return "there is no CUDA source to compile"
    nvcc, ninja = toolchain.find_nvcc(), find_ninja()
    nvrtc = None if nvcc and ninja else toolchain.find_nvrtc()
    if not (nvcc and ninja) and nvrtc is None:
        return "neither nvcc with ninja nor NVRTC was found: shipping the CUDA sources and their PTX only"
    folder.mkdir(parents=True)
    if nvrtc is None:
        compile_with_nvcc(nvcc, ninja, sources, folder)
    else:
        compile_with_nvrtc(nvrtc, sources, folder)
    compiler = toolchain.described(nvcc, nvrtc)
    made_from = {f"{source.stem}.{product}": toolchain.fingerprint(source)
                 for source in sources for product in toolchain.SHIPPED}  # fmt: skip
    manifest = {"compiler": compiler, "fingerprints": made_from}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return f"compiled {len(sources)} CUDA sources with {compiler}"


class BuildWithKernels(build_py):
    """Compile the kernels into the package, and put their sources beside them in a wheel."""

    def run(self):
        super().run()
        package = ROOT / "fusedops" if self.editable_mode else Path(self.build_lib) / "fusedops"
        print("fusedops:", compile_kernels(package / "_cubin"), flush=True)
        if not self.editable_mode:
            shutil.rmtree(package / "_csrc", ignore_errors=True)
            shutil.copytree(SOURCES, package / "_csrc")


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithKernels})
