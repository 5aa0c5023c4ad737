"""sparse_matmul by Triton: what the kernel for few rows computes, its tiles by arithmetic, and its machine code."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedops
from fusedops import explain
from fusedops._core.cubin import CubinReport
from fusedops._core.device import MIN_CAPABILITY, TARGETS
from fusedops.ops.compress_24 import reference as compression
from fusedops.ops.sparse_matmul import _triton as kernels
from fusedops.ops.sparse_matmul import reference
from fusedops.testing import assert_accurate, make_tensor
from tests.ops.common import EVERY_KERNEL, using
from tests.test_compile import OPERATOR_FILES, compiled_rows

FP8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, FP8)
TRITON_TARGETS = [target for target in TARGETS.values() if target.capability >= MIN_CAPABILITY]
SIZES = (1, 40, 576, 4096, 14336)
KINDS = [(4, False), (2, False), (1, False), (1, True)]  # bytes of a value, whether float8 is expanded


def integers(M, N, K, dtype, seed=0):
    """Operands of small integers, whose products are exact in every dtype, and the weight that they stand for."""
    draw = torch.Generator().manual_seed(seed)
    a, weight = (torch.randint(-3, 4, (size, K), generator=draw).float() for size in (M, N))
    weight = compression.prune_24(weight, torch.rand(N, K, generator=draw).double())
    return a.to(dtype), *compression.compress_24(weight.to(dtype)), weight


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_places_is_exact(dtype, implementation):
    """Each of the six pairs in every group of a row, by columns of the identity: the dense weight comes back."""
    pairs = list(itertools.combinations(range(4), 2))
    weight = torch.zeros(6, 136)
    for row, (one, other) in enumerate(pairs):
        groups = torch.arange(34)
        weight[row, 4 * groups + one], weight[row, 4 * groups + other] = groups % 7 + 1.0, -(groups % 5) - 1.0
    values, metadata = compression.compress_24(weight.to(dtype))
    scales = {"out_dtype": torch.float32} if dtype.itemsize == 1 else {}
    with using(implementation):
        out = fusedops.sparse_matmul(torch.eye(136).to(dtype), values, metadata, **scales)
    assert torch.equal(out.T.float(), weight)


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 33, 1100), (70, 65, 200)])
def test_integers_are_exact(sizes, dtype, implementation):
    """Parts of sums, and rows, columns and depth that end inside a tile."""
    a, values, metadata, weight = integers(*sizes, dtype)
    with using(implementation):
        out = fusedops.sparse_matmul(a, values, metadata, activation="relu")
    assert torch.equal(out, (a.float() @ weight.T).relu().to(out.dtype))


@given(st.data())
def test_drawn_calls_are_accurate(data):
    M, N, K = (data.draw(st.integers(1, most), name) for most, name in ((80, "M"), (70, "N"), (600, "K")))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 9))
    activation = data.draw(st.sampled_from([None, "relu", "silu", "gelu", "gelu_tanh"]))
    a, values, metadata, _ = integers(M, N, K, dtype, seed)
    if dtype.is_floating_point and dtype.itemsize > 1:
        a = make_tensor((M, K), dtype, seed=seed)
    bias = data.draw(st.sampled_from([None, make_tensor((N,), torch.float32, seed=1)]))
    scales = [None, None]
    if dtype.itemsize == 1:
        shapes = [((), (1,), (M,)), ((), (1,), (N,))]
        scales = [data.draw(st.sampled_from([None, *map(torch.rand, kinds)])) for kinds in shapes]
    out_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    with using("triton"):
        out = fusedops.sparse_matmul(
            a, values, metadata, scale_a=scales[0], scale_b=scales[1], bias=bias, activation=activation
        )
    truth = reference.sparse_matmul(a, values, metadata, *scales, bias, torch.float64, activation)
    lost = (a.double().abs() @ reference.decompressed(values, metadata, K).abs().T).max() * 1e-6
    if float(truth.abs().max()) > 100 * float(lost):  # of what cancels, float32 keeps less
        assert out.dtype == out_dtype
        assert_accurate(out, truth, zeros=False)


@EVERY_KERNEL
def test_float8_codes_of_every_bit_pattern(implementation):
    """Each code times one is itself in float32; NaN is NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    weight = torch.zeros(2, 1024, dtype=torch.uint8).view(FP8)
    for row, place in enumerate((0, 3)):
        weight.view(torch.uint8)[row, place::4] = codes.view(torch.uint8)
    values, metadata = compression.compress_24(weight)
    picks = torch.zeros(256, 1024)
    picks[torch.arange(256), 4 * torch.arange(256)] = 1
    finite = ~codes.float().isnan()
    with using(implementation):
        out = fusedops.sparse_matmul(
            picks[finite].to(FP8), torch.where(values.float().isnan(), 0, values.float()).to(FP8), metadata,
            out_dtype=torch.float32,
        )  # fmt: skip
        broken = fusedops.sparse_matmul(picks[:3].to(FP8), values, metadata, out_dtype=torch.float32)
    assert torch.equal(out[:, 0], codes.float()[finite]) and not out[:, 1].any()
    assert broken.isnan().all()  # of a row with NaN among its weights


@EVERY_KERNEL
def test_values_at_any_address(implementation):
    """A pair of values is one number to the kernel: where they do not begin at a multiple of it, they are copied."""
    a, values, metadata, weight = integers(3, 5, 128, torch.float16)
    shifted = torch.empty(values.numel() + 1, dtype=torch.float16)[1:].view_as(values).copy_(values)
    assert shifted.data_ptr() % 4 == 2
    with using(implementation):
        assert torch.equal(fusedops.sparse_matmul(a, shifted, metadata), (a.float() @ weight.T).half())


@EVERY_KERNEL
def test_a_row_of_few_has_its_bits(implementation):
    """Alone, among 17 and among 64 rows."""
    a = make_tensor((64, 1100), torch.bfloat16, seed=3)
    _, values, metadata, _ = integers(1, 40, 1100, torch.bfloat16)
    with using(implementation):
        alone, some, all_of_them = (fusedops.sparse_matmul(a[:rows], values, metadata) for rows in (1, 17, 64))
    assert torch.equal(alone[0], some[0]) and torch.equal(some, all_of_them[:17])


def test_metadata_that_is_none_reads_no_foreign_memory():
    """Equal or falling places give numbers, of the values or zero, as level 1 promises."""
    a, values, metadata, _ = integers(2, 3, 128, torch.float16)
    for byte in range(0, 256, 17):
        with using("triton"):
            out = fusedops.sparse_matmul(a, values, metadata.fill_(byte), out_dtype=torch.float16)
        assert out.isfinite().all()


def chosen(M, N, K, dtype, target):
    a, values, metadata = (
        torch.empty(*shape, dtype=kind, device="meta")
        for shape, kind in (((M, K), dtype), ((N, -(-K // 64) * 32), dtype), ((N, -(-K // 128) * 16), torch.uint8))
    )
    return explain("sparse_matmul", a, values, metadata, target=target)


def test_explain_names_the_tile():
    told = chosen(1, 4096, 4096, torch.bfloat16, "sm_90a")
    assert told.backend == "triton"
    assert told.config.startswith("SparseConfig(block_m=16, block_n=64, block_k=128, splits=8, num_warps=2")


# ---- tiles


@pytest.mark.parametrize("target", TRITON_TARGETS, ids=lambda target: target.arch)
def test_tiles(target):
    """They fit the shared memory and are loaded 16 bytes by each thread; no part of a sum is empty."""
    for M, N, K, (itemsize, expand) in itertools.product((1, 17, 64, 65, 4096), SIZES, SIZES, KINDS):
        tile = kernels.default(M, N, K, itemsize, expand, target)
        assert kernels.shared_bytes(tile, itemsize) <= target.shared_memory and tile.num_stages >= 3
        assert kernels._fits(tile, M, N, K, itemsize, expand, target)
        steps = -(-K // tile.block_k)
        assert 1 <= tile.splits <= max(steps // 4, 1)
        assert -(-steps // tile.splits) * (tile.splits - 1) < steps


@pytest.mark.parametrize("rows", [range(1, 65), range(65, 5000, 97)])
def test_a_rows_sums_do_not_depend_on_the_number_of_rows(rows):
    """Steps and parts are the same; and products are never Hopper's own, which add in another order."""
    for N, K, (itemsize, expand) in itertools.product(SIZES, SIZES, KINDS):
        tiles = [kernels.default(M, N, K, itemsize, expand, TARGETS["sm_90a"]) for M in rows]
        assert len({(tile.block_k, tile.splits) for tile in tiles}) == 1
        assert not any(tile.block_m >= 64 and tile.num_warps >= 4 for tile in tiles)


# ---- machine code


@pytest.fixture(scope="module")
def machine_code(request, tmp_path_factory):
    """The reports that tests/test_compile.py keeps."""
    path = next(path for path in OPERATOR_FILES if "sparse_matmul" in path.parts)
    rows = compiled_rows(path, request.config.cache.mkdir("fusedops_compile"), tmp_path_factory.mktemp("triton"))
    return [
        (row, row["constants"], CubinReport.from_dict(row["report"]))
        for row in rows if row["kernel"] == "_sparse_matmul_kernel" and row["target"] in ("sm_80", "sm_90a")
    ]  # fmt: skip


@pytest.mark.compile
def test_weights_are_streamed_16_bytes_at_a_time(machine_code):
    """Every asynchronous copy, of a, of values and of metadata, but float32's four bytes of metadata."""
    seen = set()
    for row, constants, report in machine_code:
        copies = {name for name in report.instructions if name.startswith("LDGSTS")}
        assert copies == {"LDGSTS.E.BYPASS.128"}, (row["types"], constants, copies)
        seen.add((row["target"], row["types"]["a_ptr"]))
    codes = {"sm_80": "*u8", "sm_90a": "*fp8e4nv"}
    every = {(t, kind) for t in codes for kind in ("*fp32", "*fp16", "*bf16", "*i8", codes[t])}
    assert seen | {("sm_80", "*fp16")} == every  # that one is compiled in the deep run only


@pytest.mark.compile
def test_the_weight_becomes_dense_in_its_thread(machine_code):
    """In the loop nothing goes to shared memory or another lane; the tensor cores' products are those of registers."""
    for row, constants, report in machine_code:
        if row["types"]["a_ptr"] == "*fp32":
            continue
        loop = max(report.loops, key=lambda one: sum(one["instructions"].values()))["instructions"]
        opcodes = {name.split(".")[0] for name in loop}
        assert not opcodes & {"STS", "STSM", "SHFL", "HGMMA", "IGMMA", "QGMMA", "STL", "LDL"}, (row, opcodes)
        assert opcodes & {"HMMA", "IMMA", "QMMA"} and report.spill_stores == report.stack_bytes == 0
        groups = int(constants["BLOCK_N"]) * int(constants["BLOCK_K"]) // 4 // (32 * report.num_warps)
        taken = sum(number for name, number in loop.items() if name.startswith("PRMT"))
        assert taken >= groups * (1 if row["types"]["a_ptr"] in ("*i8", "*fp8e4nv") else 2)
