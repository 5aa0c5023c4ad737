"""What launchers choose by arithmetic fits every GPU that is named: on many shapes, without compiling anything.

The launchers run on tensors without memory for each target, and what they would launch is recorded.
"""

import dataclasses
import functools
import itertools

import pytest
import torch

import fusedops
from fusedops._core import cuda, inspection, tuning
from fusedops._core.device import MIN_CAPABILITY, MIN_FP8_CAPABILITY, TARGETS
from fusedops._core.occupancy import MAX_BLOCK_THREADS, MAX_GRID, MAX_THREAD_REGISTERS, REGISTERS
from fusedops._core.register import operators
from fusedops.ops.attention import _triton as attention
from tests.shared_memory import from_launch, shared_memory, symbols, too_much_of_cuda
from tests.test_compile import OPERATOR_FILES, kernels_defined

FEWEST = 200  # shapes of each operator
FP8 = torch.float8_e4m3fn
NEEDS_FP8 = ("attention", "paged_attention")  # where float8 is multiplied or read as such; others expand its bytes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COLUMNS = (
    *(1, 2, 3, 8, 16, 31, 64, 100, 128, 255, 256, 576, 768, 1000, 1024, 1536, 2048, 2880, 3072, 4096, 5120, 6144, 7168),
    *(8192, 11008, 12288, 14336, 16384, 16385, 18944, 20480, 24576, 28672, 32768, 49152, 65536),
)
HEAD_DIMS = (16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def rows(number_of_tensors, dtypes=DTYPES, **kwargs):
    """Calls on equal rows."""
    for n, m, dtype in itertools.product(COLUMNS, (1, 4096), dtypes):
        yield tuple(empty(m, n, dtype=dtype) for _ in range(number_of_tensors)), kwargs


def norms(tensors, parameters=1, **kwargs):
    for args, _ in rows(tensors):
        weight = [empty(args[0].shape[-1], dtype=args[0].dtype) for _ in range(parameters)]
        yield (*args, *weight), kwargs


def quantised():
    for granularity, args in itertools.product(("row", "tensor", "block", "block_2d"), rows(1)):
        yield args[0], {"granularity": granularity}


def int4():
    for (n, k, group), dtype in itertools.product(
        itertools.product((1, 7, 576, 4096), (64, 96, 576, 1000, 4096, 14336), (32, 64, 128)), DTYPES
    ):
        yield (empty(n, k, dtype=dtype),), {"group_size": group}


def heads():
    """(tokens, heads, key heads, head dim, dtype)."""
    return itertools.product((1, 33, 4096), ((1, 1), (9, 3), (32, 8)), HEAD_DIMS, DTYPES[::2])


def rotaries():
    for tokens, (h, hk), dim, dtype in heads():
        table = empty(1, tokens, dim // 2 * 2, dtype=dtype)
        yield (empty(2, tokens, h, dim, dtype=dtype), empty(2, tokens, hk, dim, dtype=dtype), table, table), {}


def writes(rotary):
    for tokens, (h, hk), dim, dtype in heads():
        k, cache = empty(tokens, hk, dim, dtype=dtype), empty(300, 16, hk, dim, dtype=dtype)
        slots = torch.empty(tokens, dtype=torch.int64, device="meta")
        table = empty(tokens, dim, dtype=dtype)
        q = (empty(tokens, h, dim, dtype=dtype), k, k, table, table) if rotary else (k, k)
        yield (*q, cache, cache, slots), {}


def attentions():
    """Lengths, head dims and dtypes without options, then every option with some of them."""
    lengths = ((1, 1), (1, 8192), (5, 300), (64, 64), (300, 300), (4096, 4096))
    for (sq, sk), dim, dtype in itertools.product(lengths, (*HEAD_DIMS, 512), DTYPES):
        yield attention_call(sq, sk, dim, dtype), {"causal": True}
    options = (
        {"window_size": (128, 0)}, {"softcap": 30.0}, {"sinks": empty(8)}, {"mask": empty(1, 1, 300, 300)},
        {"alibi_slopes": empty(8, dtype=torch.float32)}, {"mask": empty(2, 8, 300, 300).bool()},
    )  # fmt: skip
    for option, dim in itertools.product(options, (*HEAD_DIMS, 512)):
        yield attention_call(300, 300, dim, torch.bfloat16), option
    for dim, length in itertools.product((64, 128, 256), (1, 16, 4096)):
        yield attention_call(length, 4096, dim, FP8), {}


def attention_call(num_queries, num_keys, dim, dtype):
    return (
        empty(2, num_queries, 8, dim, dtype=dtype), empty(2, num_keys, 2, dim, dtype=dtype),
        empty(2, num_keys, 2, dim, dtype=dtype),
    )  # fmt: skip


def varlens():
    for length, dim, dtype in itertools.product((1, 16, 100, 512, 4096, 16384), (*HEAD_DIMS, 512), DTYPES):
        starts = torch.empty(5, dtype=torch.int32, device="meta")
        q, k = empty(4 * length, 8, dim, dtype=dtype), empty(4 * length, 2, dim, dtype=dtype)
        yield (q, k, k, starts, starts, length, length), {"causal": True}


def merges():
    for length, dim, dtype in itertools.product((1, 16, 100, 512, 4096, 16384), (*HEAD_DIMS, 512), DTYPES):
        out, lse = empty(2, length, 8, dim, dtype=dtype), empty(2, 8, length, dtype=torch.float32)
        yield (out, lse, out, lse), {}


def pageds():
    """Decoding and chunks, pages, caches of codes, windows and trees."""
    for dim, batch, page, dtype in itertools.product((*HEAD_DIMS, 512), (1, 32, 2000), (1, 16, 64), DTYPES[::2]):
        yield paged_call(dim, batch, page, dtype, dtype), {}
    for dim, window, queries in itertools.product((*HEAD_DIMS, 512), ((-1, -1), (127, 0)), (4, 512)):
        args = paged_call(dim, 8, 16, torch.bfloat16, torch.bfloat16, queries)
        starts = torch.empty(9, dtype=torch.int32, device="meta")
        yield args, {"cu_seqlens_q": starts, "max_seqlen_q": queries, "window_size": window}
    for dim, code in itertools.product(HEAD_DIMS, (torch.int8, FP8)):
        scale = empty(2, dtype=torch.float32)
        yield paged_call(dim, 8, 16, torch.bfloat16, code), {"k_scale": scale, "v_scale": scale}


def paged_call(dim, batch, page, dtype, cache_dtype, queries=1):
    cache = empty(4096, page, 2, dim, dtype=cache_dtype)
    table = torch.empty(batch, 64, dtype=torch.int32, device="meta")
    return empty(batch * queries, 8, dim, dtype=dtype), cache, cache, table, table[:, 0].contiguous()


def products(dtype):
    """A model's layers by few and many rows; scales of rows and of blocks."""
    layers = ((576, 576), (1536, 576), (4096, 4096), (28672, 4096), (4096, 14336), (1000, 1040), (128, 128))
    numbers = (1, 2, 16, 17, 64, 65, 100, 128, 256, 1000, 4096, 16384)
    for (n, k), m, out in itertools.product(layers, numbers, DTYPES):
        scales = empty(m, dtype=torch.float32), empty(n, dtype=torch.float32)
        yield (empty(m, k, dtype=dtype), empty(n, k, dtype=dtype), *scales), {"out_dtype": out}
    for (n, k), m in itertools.product(layers, numbers):
        blocks = -(-k // 128)
        scales = empty(m, blocks, dtype=torch.float32), empty(-(-n // 128), blocks, dtype=torch.float32)
        if dtype == FP8:
            yield (empty(m, k, dtype=dtype), empty(n, k, dtype=dtype), *scales), {}


def weights():
    layers = ((576, 576), (4096, 4096), (28672, 4096), (1000, 1056))
    for (n, k), m, code, dtype in itertools.product(
        layers, (1, 2, 16, 17, 64, 65, 128, 1000, 4096), (torch.int8, FP8, "int4"), DTYPES
    ):
        if code != "int4":
            yield (empty(m, k, dtype=dtype), empty(n, k, dtype=code), empty(n, dtype=dtype)), {}
            continue
        values, groups = torch.empty(n, k // 2, dtype=torch.uint8, device="meta"), k // 32
        zero = torch.empty(n, groups, dtype=torch.uint8, device="meta")
        yield (empty(m, k, dtype=dtype), values, empty(n, groups, dtype=dtype)), {"zero": zero}


def sparse_weights():
    """Few rows, which Triton multiplies, and many, which the CUDA kernels take, but for float32."""
    layers, few = ((576, 576), (4096, 4096), (28672, 4096), (1000, 1056)), (1, 2, 8, 16, 17, 32, 33, 48, 63, 64)
    many = (65, 100, 128, 200, 256, 512, 1000, 4096, 16384)
    for (n, k), m, dtype in itertools.product(layers, (*few, *many), (*DTYPES, torch.int8, FP8)):
        metadata = torch.empty(n, -(-k // 128) * 16, dtype=torch.uint8, device="meta")
        yield (empty(m, k, dtype=dtype), empty(n, -(-k // 64) * 32, dtype=dtype), metadata), {}


GRIDS = {
    "rms_norm": functools.partial(norms, 1),
    "add_rms_norm": functools.partial(norms, 2),
    "add_rms_norm_": functools.partial(norms, 2),
    "rms_norm_quantized": functools.partial(norms, 1),
    "add_rms_norm_quantized": functools.partial(norms, 2),
    "layer_norm": functools.partial(norms, 1, 2),
    "add_layer_norm": functools.partial(norms, 2, 2),
    "silu_mul": functools.partial(rows, 2),
    "gelu_mul": functools.partial(rows, 2),
    "silu_mul_quantized": functools.partial(rows, 2),
    "quantize_int8": quantised,
    "quantize_fp8": quantised,
    "quantize_int4": int4,
    "rotary": rotaries,
    "write_kv_cache": functools.partial(writes, False),
    "rotary_write_kv_cache": functools.partial(writes, True),
    "attention": attentions,
    "attention_varlen": varlens,
    "merge_attention": merges,
    "paged_attention": pageds,
    "int8_matmul": functools.partial(products, torch.int8),
    "fp8_matmul": functools.partial(products, FP8),
    "weight_only_matmul": weights,
    "sparse_matmul": sparse_weights,
}
DIFFERENTIABLE = (
    "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "silu_mul", "gelu_mul", "rotary", "attention",
    "attention_varlen",
)  # fmt: skip


def too_much(launch, limits):
    """What of a launch a device does not have, one sentence each."""
    if isinstance(launch.kernel, cuda.Kernel):
        return too_much_of_cuda(launch, limits)
    described = from_launch(launch, limits)
    values = described.values
    warps = values.get("num_warps", 4)
    grid = launch.grid(values) if callable(launch.grid) else launch.grid
    found = [f"{name} of {value} is no power of two" for name, value in values.items()
             if (name.startswith("BLOCK_") or name == "num_warps") and (value < 1 or value & (value - 1))]  # fmt: skip
    if warps * 32 > MAX_BLOCK_THREADS:
        found.append(f"{warps} warps")
    if not all(1 <= size <= most for size, most in zip(grid, MAX_GRID)):
        found.append(f"a grid of {grid}")
    if (values.get("maxnreg") or 0) * warps * 32 > REGISTERS:
        found.append(f"{values['maxnreg']} registers of {warps} warps")
    sums = sums_of(described)
    if sums > warps * 32 * MAX_THREAD_REGISTERS:
        found.append(f"{sums} sums in {warps} warps")
    needed = shared_memory(described)
    if needed > limits.shared_memory:
        found.append(f"{needed} bytes of shared memory, there are {limits.shared_memory}")
    return found


def sums_of(described):
    """Float32 values that a program keeps in registers through its loop, at least."""
    values = described.values
    if "hopper" in described.kernel:  # its warps divide them among themselves
        return 0
    if described.kernel in ("_attention_kernel", "_paged_attention_kernel"):
        return values["BLOCK_M"] * (values["BLOCK_DV"] + values["BLOCK_N"])
    if described.kernel == "_attention_dq_kernel":
        return values["BLOCK_M"] * values["BLOCK_D"]
    if described.kernel == "_attention_dkdv_kernel":
        return values["BLOCK_N"] * (values["HAS_DK"] * values["BLOCK_D"] + values["HAS_DV"] * values["BLOCK_DV"])
    return values.get("BLOCK_M", 1) * values.get("BLOCK_N", 1)


def rejected_for(operator, args, limits):
    """Why the kernels do not take a call on a device, None where they do."""
    implementation, rejected = operator.select(args, limits)
    return None if implementation in ("cuda", "triton") else dict(rejected)["triton"]


def grid_of(op):
    """The calls of an operator; of one without a grid of its own what its example makes of rows."""
    if op in GRIDS:
        yield from GRIDS[op]()
        return
    for n, m, dtype in itertools.product(COLUMNS, (1, 4096), DTYPES):
        yield operators()[op].example((m, n), dtype, "meta")


def violations(op, backward):
    """(what is wrong with any call of the grid on any target, how many calls there were)."""
    found, number = [], 0
    for args, kwargs in grid_of(op):
        if backward and args[0].dtype == FP8:
            continue
        number += 1
        for operator, arguments in inspection.operator_calls(getattr(fusedops, op), args, kwargs, backward):
            for limits in TARGETS.values():
                shapes = [tuple(arg.shape) for arg in arguments if isinstance(arg, torch.Tensor)]
                found += [(op, limits.arch, shapes, what) for what in wrong_with(op, operator, arguments, limits)]
    return found, number


def wrong_with(op, operator, args, limits):
    """What is wrong with one call on one target, one sentence each."""
    reason, expected = rejected_for(operator, args, limits), expected_rejection(op, args, limits)
    if reason is not None or expected is not None:
        return [] if expected and expected in str(reason) else [f"rejected for {reason}, expected {expected}"]
    try:
        launches = inspection.record(operator, args, limits)
    except NotImplementedError as error:
        is_wide = args[2].shape[-1] > 256 and args[2].dtype == torch.float32
        return [] if is_wide and f"has {limits.shared_memory}" in str(error) else [str(error)]
    if not launches:
        return ["nothing is launched"]
    return [what for launch in launches for what in too_much(launch, limits)]


def expected_rejection(op, args, limits):
    """Why a device cannot take a call."""
    if limits.capability < MIN_CAPABILITY:
        return f"needs compute capability {MIN_CAPABILITY / 10}"
    has_fp8 = any(isinstance(arg, torch.Tensor) and arg.dtype == FP8 for arg in args)
    if op in NEEDS_FP8 and has_fp8 and limits.capability < MIN_FP8_CAPABILITY:
        return f"float8 needs compute capability {MIN_FP8_CAPABILITY / 10}"
    return None


@pytest.mark.parametrize("op", fusedops.OPERATORS)
def test_defaults_fit_every_target(op):
    found, number = violations(op, backward=False)
    assert number >= FEWEST
    assert not found, f"{len(found)}, such as {found[:5]}"


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_defaults_of_derivatives_fit_every_target(op):
    found, number = violations(op, backward=True)
    assert number >= FEWEST
    assert not found, f"{len(found)}, such as {found[:5]}"


def launched(op, backward, step):
    """Names of the kernels that every so many calls of a grid launch."""
    names = set()
    for args, kwargs in itertools.islice(grid_of(op), 0, None, step):
        if backward and args[0].dtype == FP8:
            continue
        for operator, arguments in inspection.operator_calls(getattr(fusedops, op), args, kwargs, backward):
            for limits in (TARGETS["sm_89"], TARGETS["sm_90a"]):
                for launch in inspection.record(operator, arguments, limits):
                    names.add(getattr(launch.kernel, "symbol", None) or launch.kernel.fn.__name__)
    return names


def test_every_kernel_is_in_a_grid():
    """A new kernel must be launched by some call of these grids, Triton's and CUDA's alike."""
    found = set().union(*(launched(op, False, 3) for op in fusedops.OPERATORS))
    found = found.union(*(launched(op, True, 17) for op in DIFFERENTIABLE))
    triton = set().union(*map(kernels_defined, OPERATOR_FILES))
    assert found == triton | symbols("sm_90a.ptx")


def test_a_launch_of_a_cuda_kernel_that_does_not_fit_is_found():
    operator, args = inspection.operator_calls(fusedops.sparse_matmul, *sparse_call(1000))[0]
    (launch,) = inspection.record(operator, args, TARGETS["sm_90a"])
    assert too_much(launch, TARGETS["sm_90a"]) == []
    assert "225376 bytes of shared memory" in too_much(launch, TARGETS["sm_86"])[0]
    for changes, sentence in (({"block": (2048, 1, 1)}, "a block of"), ({"block": (33, 1, 1)}, "a block of")):
        altered = dataclasses.replace(launch, keywords={**launch.keywords, **changes})
        assert sentence in too_much(altered, TARGETS["sm_90a"])[0]
    altered = dataclasses.replace(launch, grid=(1, 2**16, 1), kernel=cuda.Kernel("sparse_matmul", "nobody", "sm_90a"))
    grid, kernel = too_much(altered, TARGETS["sm_90a"])
    assert "a grid of" in grid and kernel == "no nobody in sparse_matmul.sm_90a.ptx"


def sparse_call(rows):
    return next((args, kwargs) for args, kwargs in sparse_weights() if len(args[0]) == rows)


def test_an_operator_without_a_grid_has_its_examples(monkeypatch):
    monkeypatch.delitem(GRIDS, "silu_mul")
    found, number = violations("silu_mul", backward=False)
    assert number >= FEWEST and not found


def calls(op):
    args, kwargs = next(iter(GRIDS[op]()))
    return inspection.operator_calls(getattr(fusedops, op), args, kwargs)[0]


def test_a_default_that_does_not_fit_is_found(monkeypatch):
    operator, args = inspection.operator_calls(fusedops.attention, attention_call(300, 300, 256, DTYPES[0]), {})[0]
    real = attention.default
    for arch, fits in (("sm_86", False), ("sm_80", True)):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "default", lambda *fields: real(*fields[:-1], TARGETS["sm_90a"]))
            tuning.forget()  # answers are remembered, also those of a patched default
            found = wrong_with("attention", operator, args, TARGETS[arch])
        tuning.forget()
        assert fits == (not found) and all("bytes of shared memory" in what for what in found)
    assert not wrong_with("attention", operator, args, TARGETS["sm_86"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"BLOCK_N": 96}, "BLOCK_N of 96 is no power of two"),
        ({"num_warps": 64}, "64 warps"),
        ({"num_warps": 3}, "num_warps of 3 is no power of two"),
        ({"maxnreg": 255, "num_warps": 16}, "255 registers of 16 warps"),
        ({"BLOCK_M": 16, "BLOCK_N": 16384, "num_warps": 8}, "262144 sums in 8 warps"),
    ],
)
def test_each_limit_of_a_launch_can_be_passed(changes, sentence):
    operator, args = calls("rms_norm")
    (launch,) = inspection.record(operator, args, TARGETS["sm_90a"])
    assert too_much(launch, TARGETS["sm_90a"]) == []
    altered = dataclasses.replace(launch, keywords={**launch.keywords, **changes})
    assert any(sentence in what for what in too_much(altered, TARGETS["sm_90a"]))


def test_a_grid_of_a_dimension_too_many_is_found():
    operator, args = calls("rms_norm")
    (launch,) = inspection.record(operator, args, TARGETS["sm_90a"])
    altered = dataclasses.replace(launch, grid=(1, 2**16))
    assert too_much(altered, TARGETS["sm_90a"]) == ["a grid of (1, 65536)"]
