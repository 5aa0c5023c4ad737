"""Where a CUDA kernel's code comes from: shipped, cached or compiled, and never from another source."""

import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import pytest

from fusedops._core import cuda, env, inspection
from fusedops._core.cuda import images, toolchain
from fusedops._core.device import TARGETS
from fusedops.warm import kernels, listing, worker

ROOT = Path(__file__).resolve().parents[2]
SOURCE = 'extern "C" __global__ void fusedops_nothing() {}\n'
NVCC = toolchain.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")


class Compiler:
    """Stands in for nvcc and NVRTC."""

    def __init__(self, monkeypatch):
        self.made = []
        self.there = True
        monkeypatch.setattr(toolchain, "compile_source", self.compile)
        monkeypatch.setattr(toolchain, "found", lambda: "a compiler" if self.there else None)

    def compile(self, source, product):
        if not self.there:
            raise RuntimeError(
                f"cuda: {source.name} cannot be compiled for {product}: neither nvcc nor NVRTC was found"
            )
        self.made.append(product)
        return f"{product} {len(self.made)}".encode()


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A package of one source with nothing compiled, and a cache directory of its own."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "nothing.cu").write_text(SOURCE)
    (folder / "some.cuh").write_text("// a header\n")
    monkeypatch.setattr(images, "sources", lambda: folder)
    monkeypatch.setattr(images, "SHIPPED", tmp_path / "_cubin")
    images._fingerprint.cache_clear()
    with env.override("FUSEDOPS_CACHE_DIR", str(tmp_path / "cache")):
        yield tmp_path
    images._fingerprint.cache_clear()


def ship(place, *products, fingerprint=None):
    made_from = fingerprint or toolchain.fingerprint(place / "csrc" / "nothing.cu")
    (place / "_cubin").mkdir(exist_ok=True)
    for product in products:
        (place / "_cubin" / f"nothing.{product}").write_text(f"shipped {product}")
    manifest = {"fingerprints": {f"nothing.{product}": made_from for product in products}}
    (place / "_cubin" / "manifest.json").write_text(json.dumps(manifest))


def commit_ptx(place, product, fingerprint=None):
    made_from = fingerprint or toolchain.fingerprint(place / "csrc" / "nothing.cu")
    (place / "csrc" / "ptx").mkdir(exist_ok=True)
    (place / "csrc" / "ptx" / f"nothing.{product}").write_text(f"// made by build_ptx.py from {made_from}\n.target\n")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("sm_80", ("sm_80.cubin", "sm_80.ptx")),
        ("sm_86", ("sm_80.cubin", "sm_80.ptx")),
        ("sm_89", ("sm_80.cubin", "sm_80.ptx")),
        ("sm_90a", ("sm_90a.cubin", "sm_90a.ptx")),
        ("sm_100a", ("sm_80.ptx",)),
        ("sm_120", ("sm_80.ptx",)),
    ],
)
def test_what_each_gpu_loads(target, expected):
    assert images.products(target) == expected


def test_shipped_machine_code_is_taken(place, monkeypatch):
    compiler = Compiler(monkeypatch)
    ship(place, *toolchain.SHIPPED)
    for target, product in (("sm_86", "sm_80.cubin"), ("sm_90a", "sm_90a.cubin"), ("sm_120", "sm_80.ptx")):
        image = images.find("nothing", target)
        assert (image.content, image.origin) == (f"shipped {product}".encode(), "shipped")
    assert compiler.made == []


@pytest.mark.parametrize("changed", ["nothing.cu", "some.cuh"])
def test_what_was_made_from_another_source_is_not_taken(place, monkeypatch, changed):
    compiler = Compiler(monkeypatch)
    ship(place, "sm_80.cubin")
    commit_ptx(place, "sm_80.ptx")
    images.find("nothing", "sm_90a")  # into the cache
    (place / "csrc" / changed).write_text(SOURCE + "// changed\n")
    images._fingerprint.cache_clear()
    assert images.find("nothing", "sm_80").content == b"sm_80.cubin 2"
    assert images.find("nothing", "sm_90a").content == b"sm_90a.cubin 3"
    assert images.ptx("nothing", "sm_80") == "sm_80.ptx 4"
    assert compiler.made == ["sm_90a.cubin", "sm_80.cubin", "sm_90a.cubin", "sm_80.ptx"]


def test_a_manifest_that_cannot_be_read_ships_nothing(place, monkeypatch):
    Compiler(monkeypatch)
    ship(place, "sm_80.cubin")
    for text in ("", "[]", "{}", '{"fingerprints": 1}'):
        (place / "_cubin" / "manifest.json").write_text(text)
        assert images.find("nothing", "sm_80").origin != "shipped"


def test_compiled_once_and_kept(place, monkeypatch):
    compiler = Compiler(monkeypatch)
    assert images.find("nothing", "sm_80").origin == "compiled"
    image = images.find("nothing", "sm_89")
    assert (image.content, image.origin) == (b"sm_80.cubin 1", "cached") and len(compiler.made) == 1
    (kept,) = (place / "cache" / "cuda").iterdir()
    assert kept.name.endswith(".sm_80.cubin")


def test_a_cache_that_cannot_be_written_costs_only_time(place, monkeypatch):
    Compiler(monkeypatch)
    (place / "cache").write_text("a file where the folder should be")
    assert images.find("nothing", "sm_80").content == b"sm_80.cubin 1"


def test_without_a_compiler_the_driver_gets_ptx(place, monkeypatch):
    Compiler(monkeypatch).there = False
    with pytest.raises(RuntimeError, match="nothing.cu cannot be compiled for sm_90a.cubin: neither nvcc nor NVRTC"):
        images.find("nothing", "sm_90a")
    commit_ptx(place, "sm_90a.ptx")
    assert images.find("nothing", "sm_90a").product == "sm_90a.ptx"


def test_jit_forbid_compiles_nothing_and_names_the_warm_up(place, monkeypatch):
    compiler = Compiler(monkeypatch)
    commit_ptx(place, "sm_80.ptx")
    with env.override("FUSEDOPS_JIT", "forbid"):
        with pytest.raises(RuntimeError, match="nothing: its CUDA kernels must be compiled for sm_80.*fusedops warmup"):
            images.find("nothing", "sm_80")
        assert images.compile_now("nothing", "sm_80")[1] and not images.compile_now("nothing", "sm_86")[1]
        assert images.find("nothing", "sm_80").origin == "cached" and compiler.made == ["sm_80.cubin"]
        assert images.find("nothing", "sm_120").origin == "shipped as PTX"


def test_the_emulator_runs_committed_ptx_without_a_compiler(place, monkeypatch):
    Compiler(monkeypatch).there = False
    commit_ptx(place, "sm_80.ptx")
    assert images.ptx("nothing", "sm_86").endswith(".target\n")
    with pytest.raises(RuntimeError, match="neither nvcc nor NVRTC"):
        images.ptx("nothing", "sm_90a")


def test_a_warm_up_compiles_a_source_once_for_all_of_its_kernels(place, monkeypatch):
    compiler = Compiler(monkeypatch)
    launches = [
        inspection.Launch(cuda.Kernel("nothing", symbol, "sm_90a"), (1, 1, 1), [], {}) for symbol in ("first", "second")
    ]
    monkeypatch.setattr(kernels, "record", lambda *args: launches)
    (job,), silent = kernels.of_calls([(None, ())], TARGETS["sm_90a"])
    assert silent == {} and pickle.loads(pickle.dumps(job)) == job
    assert not listing.is_compiled((job.name, images.fingerprint("nothing")))
    done = worker._done(job, False)
    assert done.pop("seconds") >= 0
    made_from = images.fingerprint("nothing")
    assert done == {"name": "CUDA nothing.cu for sm_90a", "hash": made_from, "compiled": True}
    assert not worker._done(job, False)["compiled"] and compiler.made == ["sm_90a.cubin"]
    assert listing.is_compiled((job.name, made_from)) and not listing.is_compiled((job.name, "0" * 24))
    with env.override("FUSEDOPS_JIT", "forbid"):
        assert images.find("nothing", "sm_90a").origin == "cached"


def test_a_warm_up_says_that_there_is_no_compiler(place, monkeypatch):
    Compiler(monkeypatch).there = False
    commit_ptx(place, "sm_90a.ptx")
    done = worker._done(kernels.CudaJob("nothing", "sm_90a"), False)
    assert "neither nvcc nor NVRTC" in done["error"]


@needs_nvcc
@pytest.mark.compile
def test_nvcc_compiles_each_product(place):
    path = place / "csrc" / "nothing.cu"
    assert toolchain.compile_source(path, "sm_90a.cubin").startswith(b"\x7fELF")
    text = toolchain.compile_source(path, "sm_90a.ptx").decode()
    assert ".target sm_90a" in text and ".loc" in text
    path.write_text("not C++")
    with pytest.raises(RuntimeError, match="nvcc could not compile nothing.cu for sm_80.cubin:\n.*nothing.cu.*error"):
        toolchain.compile_source(path, "sm_80.cubin")


def committed():
    """csrc/build_ptx.py as a module."""
    spec = importlib.util.spec_from_file_location("build_ptx", ROOT / "csrc" / "build_ptx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_ptx_is_that_of_the_sources():
    made = committed()
    outdated = [
        made.path_of(source, product).name
        for source, product in made.outputs()
        if not made.path_of(source, product).is_file()
        or toolchain.fingerprint(source) not in made.path_of(source, product).read_text().splitlines()[0]
    ]
    assert not outdated, "run python csrc/build_ptx.py"


@pytest.mark.deep
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")
def test_the_committed_ptx_is_what_nvcc_makes():
    made = committed()
    if made.nvcc() is None:
        pytest.skip(f"needs nvcc of CUDA {made.NVCC_RELEASE}")
    for source, product in made.outputs():
        assert made.path_of(source, product).read_text() == made.text_of(source, product), (source.name, product)
