"""Wheels built with nvcc, with NVRTC alone and with neither: one file for every machine, whose kernels load."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fusedops._core import cubin
from fusedops._core.cuda import images, toolchain

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "fusedops")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "_cubin", "_csrc")
STUB = ROOT / "tests" / "data" / "cuda_driver_stub.c"
MAX_WHEEL_BYTES = 8 * 1024 * 1024
NVCC, NINJA, NVRTC = toolchain.find_nvcc(), shutil.which("ninja"), toolchain.find_nvrtc()
pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77 or newer")

# Runs in the unpacked wheel: what a machine with this GPU would load, without compiling anything.
LOAD = """
import json, sys
from fusedops._core import env
from fusedops._core.cuda import images
print(json.dumps({
    "place": images.__file__,
    "names": images.names(),
    "found": {target: [(image.product, image.origin) for image in [images.ready(images.names()[0], target)] if image]
              for target in ("sm_80", "sm_89", "sm_90a", "sm_100a")},
}))
"""

# The same with a stand-in of the driver: its words on what it was given.
LAUNCHER = """
import ctypes, sys
from fusedops._core import cuda
from fusedops._core.cuda import driver, images
driver.LIBRARY = sys.argv[1]
for target in ("sm_80", "sm_90a"):
    cuda.load(images.names()[0], "fusedops_of_this_test", target)._load(0)
    print(ctypes.c_int.in_dll(driver.library(), "stub_capability").value)
"""


def build(folder, *, compilers):
    """(path of the wheel, what the build printed), made from a copy of the sources."""
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part, **({"ignore": LEFT_OUT} if copy is shutil.copytree else {}))
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    if not compilers:
        environment["PATH"] = str(folder)  # nothing is found in it
    code = "import sys; from setuptools import build_meta; print('made', build_meta.build_wheel(sys.argv[1]))"
    ended = subprocess.run(
        [sys.executable, "-c", code, folder / "dist"], cwd=source, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel, ended.stdout


def unpacked(wheel, folder, code, *arguments):
    """What code prints where the unpacked wheel is the package."""
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "FUSEDOPS_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def loaded(wheel, folder):
    """What LOAD tells of an unpacked wheel."""
    told = json.loads(unpacked(wheel, folder, LOAD))
    assert told["place"].startswith(str(folder / "site")) and told["names"] == images.names() != []
    return {target: tuple(map(tuple, found)) for target, found in told["found"].items()}


def checked(wheel):
    """Names in a wheel that every build must have right."""
    assert wheel.name.endswith("-py3-none-any.whl") and wheel.stat().st_size < MAX_WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in (ROOT / "csrc" / "cuda").rglob("*.*"):
        assert f"fusedops/_csrc/{path.relative_to(ROOT / 'csrc' / 'cuda').as_posix()}" in names
    assert "fusedops/testing/ptx/machine/api.cpp" in names
    assert not any(name.startswith(("tests/", "csrc/", "benchmarks/")) for name in names)
    return names


@pytest.mark.skipif(NVRTC is not None, reason="NVRTC is here, and a build finds it")
def test_without_a_compiler_the_wheel_has_sources_and_ptx(tmp_path):
    wheel, printed = build(tmp_path, compilers=False)
    assert "neither nvcc with ninja nor NVRTC was found: shipping the CUDA sources and their PTX only" in printed
    assert not any(name.startswith("fusedops/_cubin/") for name in checked(wheel))
    older, hopper = (("sm_80.ptx", "shipped as PTX"),), (("sm_90a.ptx", "shipped as PTX"),)
    assert loaded(wheel, tmp_path) == {"sm_80": older, "sm_89": older, "sm_90a": hopper, "sm_100a": older}


def check_compiled(wheel, folder, compiler):
    shipped = {name for name in checked(wheel) if name.startswith("fusedops/_cubin/")}
    products = {f"fusedops/_cubin/{name}.{product}" for name in images.names() for product in toolchain.SHIPPED}
    assert shipped == {*products, "fusedops/_cubin/manifest.json"}
    with zipfile.ZipFile(wheel) as archive:
        for name in images.names():
            for target, capability in (("sm_80", 80), ("sm_90a", 90)):
                assert cubin.capability(archive.read(f"fusedops/_cubin/{name}.{target}.cubin")) == capability
        assert json.loads(archive.read("fusedops/_cubin/manifest.json"))["compiler"].startswith(compiler)
    stub = folder / "libcuda.so.1"
    subprocess.run([shutil.which("gcc") or "cc", "-shared", "-fPIC", "-o", stub, STUB], check=True)
    assert unpacked(wheel, folder, LAUNCHER, stub).split() == ["80", "90"]
    assert loaded(wheel, folder) == {
        "sm_80": (("sm_80.cubin", "shipped"),),
        "sm_89": (("sm_80.cubin", "shipped"),),
        "sm_90a": (("sm_90a.cubin", "shipped"),),
        "sm_100a": (("sm_80.ptx", "shipped"),),
    }


@pytest.mark.deep
@pytest.mark.compile
@pytest.mark.skipif(NVCC is None or NINJA is None, reason="needs nvcc and ninja on the PATH")
def test_with_nvcc_the_wheel_has_machine_code(tmp_path):
    wheel, printed = build(tmp_path, compilers=True)
    total = len(images.names()) * len(toolchain.SHIPPED)
    assert f"[{total}/{total}] nvcc" in printed and "CUDA sources with nvcc" in printed
    check_compiled(wheel, tmp_path, "nvcc ")


@pytest.mark.deep
@pytest.mark.compile
@pytest.mark.skipif(NVRTC is None, reason="NVRTC is neither a Python package here nor on the library path")
def test_with_nvrtc_alone_the_wheel_has_machine_code(tmp_path):
    wheel, printed = build(tmp_path, compilers=False)
    assert "CUDA sources with NVRTC" in printed
    check_compiled(wheel, tmp_path, "NVRTC ")
