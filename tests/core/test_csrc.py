"""csrc/cuda/common.cuh compiles for every target, with the instructions that it promises; setup.py compiles kernels."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fusedops._core import cubin
from fusedops._core.cuda import toolchain

pytestmark = pytest.mark.compile

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
HAS_NVRTC = toolchain.find_nvrtc() is not None
TARGETS = ("sm_80", "sm_90a", "sm_100a")

KERNELS = """
#include "common.cuh"
using namespace fusedops;

// One block divides one row by its sum or maximum.
template <typename T, typename Operation, int NUM_WARPS>
__device__ void divide_row(const T* x_ptr, T* out_ptr, int N) {
    __shared__ float partial_smem[NUM_WARPS];
    const long long row = static_cast<long long>(blockIdx.x) * N;
    const int num_vectors = cdiv(N, Vector16<T>::SIZE);
    float acc = Operation::identity();
    for (int n = threadIdx.x; n < num_vectors; n += blockDim.x) {
        const Vector16<T> x = load_16(x_ptr + row + n * Vector16<T>::SIZE);
        for (int i = 0; i < Vector16<T>::SIZE; ++i) acc = Operation::combine(acc, to_float(x.element[i]));
    }
    acc = block_reduce<Operation, NUM_WARPS>(acc, partial_smem);
    for (int n = threadIdx.x; n < num_vectors; n += blockDim.x) {
        Vector16<T> x = load_16(x_ptr + row + n * Vector16<T>::SIZE);
        for (int i = 0; i < Vector16<T>::SIZE; ++i) x.element[i] = from_float<T>(to_float(x.element[i]) / acc);
        store_16(out_ptr + row + n * Vector16<T>::SIZE, x);
    }
}

extern "C" __global__ void sum_float(const float* x, float* out, int N) { divide_row<float, Sum, 4>(x, out, N); }
extern "C" __global__ void sum_half(const Half* x, Half* out, int N) { divide_row<Half, Sum, 4>(x, out, N); }
extern "C" __global__ void max_bf(const BFloat16* x, BFloat16* out, int N) { divide_row<BFloat16, Max, 1>(x, out, N); }
"""


@pytest.fixture
def setup_module(monkeypatch, tmp_path):
    """setup.py as a module, with a folder of sources of its own."""
    spec = importlib.util.spec_from_file_location("fusedops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc" / "cuda", sources, ignore=shutil.ignore_patterns("*.cu"))
    monkeypatch.setattr(module, "SOURCES", sources)
    monkeypatch.setattr(module, "WORK", tmp_path / "build")
    return module


def disassembler():
    """nvdisasm of the toolkit, or the one that triton brings."""
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("triton")
    packaged = Path(spec.submodule_search_locations[0], "backends/nvidia/bin/nvdisasm") if spec else None
    return found or (str(packaged) if packaged and packaged.exists() else None)


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
def test_common_header_compiles_without_spills(target, tmp_path):
    source, cubin = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    source.write_text(KERNELS)
    line = [NVCC, "-std=c++17", "-O3", "-Werror", "all-warnings", f"-arch={target}", "--cubin", "-Xptxas", "-v"]
    built = subprocess.run([*line, "-I", ROOT / "csrc" / "cuda", "-o", cubin, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert built.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 3, built.stderr
    tool = disassembler()
    if tool is None:
        pytest.skip("neither the toolkit nor triton brings nvdisasm")
    listing = subprocess.run([tool, cubin], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\bLDG\.E\.128", listing)) >= 6
    assert len(re.findall(r"\bSTG\.E\.128", listing)) >= 3
    assert not re.findall(r"\b(?:LDG|STG)\.E(?!\.128)\b", listing)


def test_header_includes_nothing():
    assert "#include" not in (ROOT / "csrc" / "cuda" / "common.cuh").read_text()


def test_setup_without_sources_does_nothing(setup_module, tmp_path):
    assert setup_module.compile_kernels(tmp_path / "cubin") == "there is no CUDA source to compile"
    assert not (tmp_path / "cubin").exists()


def without(monkeypatch, module, *compilers):
    for compiler in compilers:
        monkeypatch.setattr(module.toolchain, f"find_{compiler}", lambda: None)


def test_setup_without_compiler_says_so_and_leaves_nothing_old(setup_module, tmp_path, monkeypatch):
    (setup_module.SOURCES / "kernels.cu").write_text(KERNELS)
    (tmp_path / "cubin").mkdir()
    (tmp_path / "cubin" / "kernels.sm_80.cubin").touch()
    without(monkeypatch, setup_module, "nvcc", "nvrtc")
    assert "shipping the CUDA sources and their PTX only" in setup_module.compile_kernels(tmp_path / "cubin")
    assert not (tmp_path / "cubin").exists()


@needs_nvcc
@pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not on the PATH")
def test_setup_compiles_with_nvcc_what_has_changed(setup_module, tmp_path, capfd):
    (setup_module.SOURCES / "kernels.cu").write_text(KERNELS)
    (setup_module.SOURCES / "others.cu").write_text('extern "C" __global__ void other() {}')
    assert "nvcc" in setup_module.compile_kernels(tmp_path / "cubin")
    assert "[6/6] nvcc" in capfd.readouterr().out, "ninja shows how far it is"
    check_outputs(tmp_path / "cubin", setup_module)
    first = (tmp_path / "cubin" / "manifest.json").read_text()
    header = setup_module.SOURCES / "common.cuh"
    header.write_text(header.read_text().replace("return a + b", "return b + a") + "// changed")
    setup_module.compile_kernels(tmp_path / "cubin")
    assert "[3/3] nvcc" in capfd.readouterr().out, "only the source that includes the header is compiled again"
    assert (tmp_path / "cubin" / "manifest.json").read_text() != first
    setup_module.compile_kernels(tmp_path / "cubin")
    assert "no work to do" in capfd.readouterr().out


@needs_nvcc
@pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not on the PATH")
def test_a_source_that_does_not_compile_stops_the_build(setup_module, tmp_path):
    (setup_module.SOURCES / "kernels.cu").write_text("not C++")
    with pytest.raises(subprocess.CalledProcessError):
        setup_module.compile_kernels(tmp_path / "cubin")


@pytest.mark.skipif(not HAS_NVRTC, reason="NVRTC is neither a Python package here nor on the library path")
def test_setup_compiles_with_nvrtc(setup_module, tmp_path, monkeypatch):
    (setup_module.SOURCES / "kernels.cu").write_text(KERNELS)
    without(monkeypatch, setup_module, "nvcc")
    assert "NVRTC" in setup_module.compile_kernels(tmp_path / "cubin")
    check_outputs(tmp_path / "cubin", setup_module)
    (setup_module.SOURCES / "kernels.cu").write_text("not C++")
    with pytest.raises(RuntimeError, match="could not compile kernels.cu for sm_80"):
        setup_module.compile_kernels(tmp_path / "cubin")


def check_outputs(folder, setup_module):
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("kernels")}
    assert set(files) == {"kernels.sm_80.cubin", "kernels.sm_90a.cubin", "kernels.sm_80.ptx"}
    assert [cubin.capability(files[f"kernels.{target}.cubin"]) for target in ("sm_80", "sm_90a")] == [80, 90]
    assert b".entry sum_half" in files["kernels.sm_80.ptx"] and b".target sm_80" in files["kernels.sm_80.ptx"]
    assert str(ROOT).encode() not in files["kernels.sm_80.ptx"], "what is shipped names no folder of the build"
    manifest = json.loads((folder / "manifest.json").read_text())
    made_from = setup_module.toolchain.fingerprint(setup_module.SOURCES / "kernels.cu")
    assert {manifest["fingerprints"][name] for name in files} == {made_from}
