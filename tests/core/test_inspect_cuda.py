"""What `fusedops inspect` says of CUDA kernels: their machine code is read, wherever it comes from."""

import pytest
import torch

import fusedops
from fusedops._core import cubin, cuda, env, inspection, sass
from fusedops._core.cuda import images, machine_code, toolchain
from fusedops._core.device import TARGETS
from fusedops._core.occupancy import occupancy
from fusedops.cli.explain import example_call
from fusedops.ops.sparse_matmul._cuda import mma, wgmma

pytestmark = pytest.mark.compile
BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def cache(tmp_path):
    """No machine code but what these tests make."""
    with env.override("FUSEDOPS_CACHE_DIR", str(tmp_path)):
        yield tmp_path


@pytest.fixture
def only_ptx(monkeypatch):
    """What a checkout holds before it is installed: PTX, and no machine code that setup.py compiled."""
    monkeypatch.setattr(images, "SHIPPED", images.PACKAGE / "_none")


def call(rows, columns=1024, depth=2048, dtype=BF16):
    """Arguments without memory of a product."""
    a = torch.empty(rows, depth, dtype=dtype, device="meta")
    values = torch.empty(columns, depth // 2, dtype=dtype, device="meta")
    return a, values, torch.empty(columns, depth // 8, dtype=torch.uint8, device="meta")


def inspected(target, rows=512, dtype=BF16, **options):
    found = fusedops.inspect("sparse_matmul", *call(rows, dtype=dtype), target=target, **options)
    (kernel,) = found.kernels
    return found, kernel


@pytest.mark.parametrize(
    ("dtype", "opcode", "kind"), [(BF16, "HGMMA.SP", "fp16"), (INT8, "IGMMA.SP", "int8"), (FP8, "QGMMA.SP", "fp8")]
)
def test_a_kernel_of_hopper(dtype, opcode, kind):
    found, kernel = inspected("sm_90a", dtype=dtype)
    tile = wgmma.default(512, 1024, dtype, TARGETS["sm_90a"])
    report = kernel.report
    assert kernel.kernel == report.kernel == tile.symbol(dtype) and f"block_m={tile.block_m}" in found.configs[0]
    assert (report.target, report.num_warps, report.registers, report.stack_bytes) == ("sm_90a", 12, 168, 0)
    assert report.shared_bytes == wgmma.shared_bytes(tile, dtype.itemsize) and not report.spill_in_loop
    products = sass.matrix(kernel.main_loop["instructions"])
    assert sum(products.values()) == 4 and all(name.startswith(opcode) for name in products)
    assert report.count("UTMALDG") >= 3 and report.count("UTMASTG") == 1
    assert kernel.occupancy == occupancy(90, 12, 168, report.shared_bytes) and kernel.grid[1:] == (1, 1)
    a, values, metadata = call(512, dtype=dtype)
    out_bytes = 512 * 1024 * 2
    assert found.bytes == sum(x.numel() * x.element_size() for x in (a, values, metadata)) + out_bytes
    assert found.operations == 2 * 512 * 1024 * 1024  # what is stored, half of the columns
    assert found.bound.kind == kind and found.bound.limiter in str(found)


@pytest.mark.parametrize(("target", "arch"), [("sm_86", "sm_80"), ("sm_100a", "sm_100a"), ("sm_120", "sm_120")])
def test_the_kernel_of_other_gpus(target, arch, only_ptx):
    """Those of one generation load the machine code of its first, later ones compile the PTX for themselves."""
    found, kernel = inspected(target)
    tile = mma.default(512, 1024, TARGETS[target])
    assert kernel.kernel == tile.symbol(BF16) and kernel.report.target == arch
    products = sass.matrix(kernel.main_loop["instructions"])
    assert products == {"HMMA.SP.16832.F32.BF16": 64 if tile is mma.LARGE else 32}
    assert kernel.report.shared_bytes == tile.shared_bytes(2) and kernel.report.num_warps == 4
    assert kernel.grid == (512 // tile.block_m * (1024 // tile.block_n), 1, 1)
    assert kernel.origin.startswith("sm_80.ptx, shipped as PTX, assembled by ptxas 1")


def test_configurations_are_compared():
    kernels = [inspected("sm_90a", config={"block_m": size})[1].kernel for size in (64, 256)]
    assert kernels == [wgmma.WgmmaConfig(size).symbol(BF16) for size in (64, 256)]
    with pytest.raises(ValueError, match="config must be one that H100 SXM holds and the kernel takes .*block_m=256"):
        inspected("sm_90a", dtype=FP8, config={"block_m": 256})
    assert inspected("sm_80", config={"block_m": 64})[1].kernel == mma.SMALL.symbol(BF16)


def test_what_was_read_once_is_kept(monkeypatch):
    first = inspected("sm_120")[1]
    monkeypatch.setattr(cubin, "assemble", lambda *args: pytest.fail("assembled again"))
    assert inspected("sm_120")[1] == first
    with pytest.raises(pytest.fail.Exception, match="assembled again"):
        inspected("sm_120", rows=4096)  # another tile


def test_shipped_machine_code_comes_first(monkeypatch, tmp_path):
    """A file with several kernels, of which the one that is launched is read."""
    text = images.kept("sparse_matmul", "sm_80.ptx").content
    symbols = mma.SMALL.symbol(BF16), mma.SMALL.symbol(INT8)
    (tmp_path / "whole.ptx").write_bytes(text)
    entries = [part for symbol in symbols for part in ("--entry", symbol)]
    arguments = ("--gpu-name=sm_80", *entries, str(tmp_path / "whole.ptx"), "-o", str(tmp_path / "whole.cubin"))
    cubin._run_tool(cubin._newest_ptxas(), *arguments)
    whole = images.Image((tmp_path / "whole.cubin").read_bytes(), "sm_80.cubin", "shipped")
    monkeypatch.setattr(images, "kept", lambda name, product: whole if product.endswith("cubin") else None)
    products = []
    for symbol in symbols:
        found, origin = machine_code.report_of(cuda.load("sparse_matmul", symbol, "sm_80"), 4, 1000)
        assert (found.kernel, found.shared_bytes, origin) == (symbol, 1000, "sm_80.cubin, shipped")
        products.append({name.partition(".")[0] for name in sass.matrix(found.instructions)})
    assert products == [{"HMMA"}, {"IMMA"}]
    with pytest.raises(RuntimeError, match="cubin: machine code must be that of one kernel nobody, got 0"):
        machine_code.report_of(cuda.Kernel("sparse_matmul", "nobody", "sm_80"), 4, 1000)


def test_without_machine_code_and_ptx_a_compiler_is_asked(monkeypatch):
    asked = []

    def compile_source(source, product):
        asked.append((source.name, product))
        raise RuntimeError(f"cuda: {source.name} cannot be compiled for {product}: neither nvcc nor NVRTC was found")

    monkeypatch.setattr(images, "kept", lambda name, product: None)
    monkeypatch.setattr(toolchain, "compile_source", compile_source)
    for target, product in (("sm_90a", "sm_90a.cubin"), ("sm_89", "sm_80.cubin"), ("sm_120", "sm_80.ptx")):
        with pytest.raises(RuntimeError, match=f"sparse_matmul.cu cannot be compiled for {product}: neither nvcc nor"):
            inspected(target)
        assert asked.pop() == ("sparse_matmul.cu", product) and not asked


def test_few_rows_are_tritons(capsys):
    """Whose kernels this process, with the interpreter, cannot compile."""
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET=1"):
        inspected("sm_90a", rows=8)
    positional, named = example_call("sparse_matmul", (8, 128), BF16, "meta")
    ((operator, args),) = inspection.operator_calls(fusedops.sparse_matmul, positional, named)
    launches = inspection.record(operator, args, TARGETS["sm_90a"])
    assert launches and not any(isinstance(launch.kernel, cuda.Kernel) for launch in launches)
