"""What the tests of batch-invariant mode compute: calls of every operator of which each row can be had alone."""

import functools
from dataclasses import dataclass, replace

import torch

import fusedops
from fusedops.ops.compress_24 import reference as compression
from fusedops.testing import make_tensor
from tests.ops.common import EMULATED_TARGETS, as_tuple
from tests.ops.paged_problems import problem

FP8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
HOSTILE = float("nan"), float("inf"), -float("inf"), 1e4
N = 77


@dataclass
class Case:
    """A call of which every row can be computed alone.

    Attributes:
        row: Function (seed, number) of one row's tensors; number tells neighbours apart, None is the row under test.
        run: Function (rows) of the outputs, each with one entry for each row.
        many: The numbers of rows of the tests with compiled kernels.
        differs: (implementation, rows) with which the row differs without the mode, or None.
        emulated: Targets that it is compiled for. Of Hopper's attention several warpgroups clear the values that no
            query sees, and write the same; the emulator calls that a race.
    """

    row: object
    run: object
    many: tuple = (2, 17)
    differs: tuple | None = None
    emulated: tuple = EMULATED_TARGETS


def drawn(shape, dtype, seed, number):
    """Numbers; of neighbours one in two is full of something worse."""
    x = make_tensor(shape, dtype, seed=seed)
    return x if number is None or number % 2 else x.fill_(HOSTILE[number // 2 % len(HOSTILE)])


def shared(shape, dtype=F32, seed=99):
    return make_tensor(shape, dtype, seed=seed)


def rowwise(function, count=1, dtype=F32, n=N, **changed):
    """A case of `function` of matrices of rows of n elements."""

    def row(seed, number):
        return [drawn((n,), dtype, seed + i, number) for i in range(count)]

    def run(rows):
        return as_tuple(function(*(torch.stack(part) for part in zip(*rows))))

    return Case(row, run, **changed)


def in_place(x, residual):
    fusedops.add_rms_norm_(x, residual, shared((x.shape[-1],), x.dtype))
    return x, residual


def weighted(function, **options):
    return lambda *tensors: function(*tensors, shared((tensors[0].shape[-1],), tensors[0].dtype), **options)


def scaled(function, dtype, columns, depth, blocks=False, **options):
    """Products of codes with a scale for each row, or for blocks of it."""
    largest = 3.0 if dtype == torch.int8 else 100.0
    b = (shared((columns, depth)) * largest).to(dtype)
    scale_b = shared((-(-columns // 128), -(-depth // 128))).abs() if blocks else shared((columns,)).abs()

    def row(seed, number):
        hostile = number is not None and number % 2 == 0
        codes = (make_tensor((depth,), F32, seed=seed) * largest).clamp(-400, 400).to(dtype)
        if hostile and dtype == FP8:
            codes = torch.full((depth,), float("nan")).to(dtype)
        scale = make_tensor((-(-depth // 128),) if blocks else (), F32, seed=seed + 1).abs()
        return codes, scale * (float("inf") if hostile else 1), drawn((columns,), F32, seed + 2, number)

    def run(rows):
        a, scale, residual = (torch.stack(part) for part in zip(*rows))
        options_ = {"bias": shared((columns,)), "out_dtype": F32, "residual": residual, **options}
        return as_tuple(function(a, b, scale, scale_b, **options_))

    return row, run


def weight_only(values, scale, dtype=F32, depth=1024, **options):
    def row(seed, number):
        return drawn((depth,), dtype, seed, number), drawn((len(values),), dtype, seed + 1, number)

    def run(rows):
        x, residual = (torch.stack(part) for part in zip(*rows))
        return as_tuple(fusedops.weight_only_matmul(x, values, scale, residual=residual, **options))

    return row, run


def sparse(dtype=BF16, columns=72, depth=1024, **options):
    stored = compression.compress_24(compression.prune_24(shared((columns, depth), dtype), None))

    def row(seed, number):
        return (drawn((depth,), dtype, seed, number),)

    def run(rows):
        a = torch.stack([one for (one,) in rows])
        return as_tuple(fusedops.sparse_matmul(a, *stored, bias=shared((columns,)), **options))

    return row, run


def sequences(queries, keys, heads=2, dim=16, dtype=F32, **options):
    """Attention on a batch of equal lengths."""

    def row(seed, number):
        sizes = (queries, heads), (keys, 1), (keys, 1)
        return [drawn((*size, dim), dtype, seed + i, number) for i, size in enumerate(sizes)]

    def run(rows):
        return fusedops.attention(*(torch.stack(part) for part in zip(*rows)), return_lse=True, **options)

    return row, run


def packed(queries, keys, dtype=F32, dim=16, **options):
    """Attention on packed sequences; neighbours have other lengths."""

    def row(seed, number):
        more = 0 if number is None else (number * 37) % 90 - 20
        new = max(queries + more, 1)
        sizes = (new, 2), (keys + 3 * abs(more), 1), (keys + 3 * abs(more), 1)
        return [drawn((*size, dim), dtype, seed + i, number) for i, size in enumerate(sizes)]

    def run(rows):
        q, k, v = (torch.cat(part) for part in zip(*rows))
        counts = [[0, *(len(row[side]) for row in rows)] for side in (0, 1)]
        starts = [torch.tensor(count, dtype=torch.int32).cumsum(0, dtype=torch.int32) for count in counts]
        out, lse = fusedops.attention_varlen(q, k, v, *starts, *map(max, counts), return_lse=True, **options)
        return out.split(counts[0][1:]), lse.split(counts[0][1:], 1)

    return row, run


def paged(queries, keys, neighbours=(1, 40), **options):
    """Attention to pages. A neighbour has some of its own queries, and up to as many keys more."""

    def row(seed, number):
        more = 0 if number is None else 1 + (number * 977) % neighbours[1]
        new = queries if number is None else 1 + number % neighbours[0]
        hidden = problem([(new, keys + more)], seed=seed)
        for tensor in (hidden.q, hidden.keys, hidden.values):
            if number is not None and number % 2 == 0:
                tensor.fill_(HOSTILE[number // 2 % len(HOSTILE)])
        return hidden

    def run(rows):
        parts = (torch.cat([getattr(row, name) for row in rows]) for name in ("q", "keys", "values"))
        lengths = [row.lengths[0] for row in rows]
        found = replace(rows[0], **dict(zip(("q", "keys", "values"), parts)), lengths=lengths, options=options)
        out, lse = found.run(seed=len(rows), varlen=True)
        return out.split([new for new, _ in lengths]), lse.split([new for new, _ in lengths], 1)

    return row, run


def rotated(seed_shape=(3, 2, 16)):
    length, heads, dim = seed_shape

    def row(seed, number):
        sizes = (length, heads, dim), (length, 1, dim), (length, dim // 2), (length, dim // 2)
        return [drawn(size, F32, seed + i, number) for i, size in enumerate(sizes)]

    return row, lambda rows: fusedops.rotary(*(torch.stack(part) for part in zip(*rows)))


def written(cache_dtype, turned=False):
    """The slots that new tokens are written to, one a page."""

    def row(seed, number):
        return [drawn(size, F32, seed + i, number) for i, size in enumerate([(1, 16)] * 3 + [(8,)] * 2)]

    def run(rows):
        q, k, v, cos, sin = (torch.stack(part) for part in zip(*rows))
        caches = [torch.zeros(len(rows), 8, 1, 16, dtype=cache_dtype) for _ in "kv"]
        slots = torch.arange(len(rows)) * 8 + 3
        scales = {} if cache_dtype == F32 else {f"{name}_scale": torch.zeros(len(rows), 8, 1) for name in "kv"}
        if turned:
            out = fusedops.rotary_write_kv_cache(q, k, v, cos, sin, *caches, slots, **scales)
            return out, *caches, *scales.values()
        fusedops.write_kv_cache(k, v, *caches, slots, **scales)
        return *caches, *scales.values()

    return row, run


def merged():
    def row(seed, number):
        return [drawn(size, F32, seed + i, number) for i, size in enumerate([(3, 2, 24), (2, 3)] * 2)]

    return row, lambda rows: fusedops.merge_attention(*(torch.stack(part) for part in zip(*rows)))


@functools.cache
def stored_weights(kind, columns=96, depth=1024):
    """Weights of a kind and their scales."""
    weight = shared((columns, depth))
    if kind == "int4":
        return fusedops.quantize_int4(weight, group_size=64)
    values, scale = (fusedops.quantize_int8 if kind == "int8" else fusedops.quantize_fp8)(weight)
    return values, scale


CASES = {
    "rms_norm": rowwise(weighted(fusedops.rms_norm)),
    "rms_norm long": rowwise(weighted(fusedops.rms_norm), n=20000, dtype=BF16, many=(2, 5), emulated=("sm_80",)),
    "add_rms_norm": rowwise(weighted(fusedops.add_rms_norm), 2, BF16, emulated=("sm_80",)),
    "add_rms_norm_": rowwise(in_place, 2, emulated=()),
    "rms_norm_quantized": rowwise(weighted(fusedops.rms_norm_quantized), emulated=()),
    "add_rms_norm_quantized": rowwise(weighted(fusedops.add_rms_norm_quantized), 2, emulated=()),
    "layer_norm": rowwise(weighted(fusedops.layer_norm), dtype=BF16, emulated=("sm_80",)),
    "add_layer_norm": rowwise(weighted(fusedops.add_layer_norm), 2, emulated=()),
    "silu_mul": rowwise(fusedops.silu_mul, 2, emulated=()),
    "gelu_mul": rowwise(fusedops.gelu_mul, 2, emulated=()),
    "silu_mul_quantized": rowwise(fusedops.silu_mul_quantized, 2, emulated=("sm_80",)),
    "quantize_int8": rowwise(fusedops.quantize_int8, emulated=()),
    "quantize_fp8": rowwise(functools.partial(fusedops.quantize_fp8, granularity="block"), n=300, emulated=("sm_90a",)),
    "quantize_int4": rowwise(functools.partial(fusedops.quantize_int4, group_size=32), emulated=()),
    "int8_matmul": Case(*scaled(fusedops.int8_matmul, torch.int8, 96, 1040, activation="silu"), many=(2, 65)),
    "fp8_matmul": Case(
        *scaled(fusedops.fp8_matmul, FP8, 96, 1040), many=(2, 65), differs=("triton", 65), emulated=("sm_90a",)
    ),
    "fp8_matmul blocks": Case(
        *scaled(fusedops.fp8_matmul, FP8, 64, 1040, blocks=True), many=(65,), emulated=("sm_90a",)
    ),
    "weight_only int8": Case(*weight_only(*stored_weights("int8")), many=(2, 65), differs=("triton", 65)),
    "weight_only fp8": Case(*weight_only(*stored_weights("fp8"), BF16, activation="silu"), many=(65,)),
    "weight_only int4": Case(
        *weight_only(*stored_weights("int4")[:2], BF16, zero=stored_weights("int4")[2]), many=(65,)
    ),
    "sparse_matmul": Case(*sparse(activation="silu"), many=(2, 65)),
    "attention decode": Case(*sequences(1, 300), many=(2, 17), differs=("triton", 5)),
    "attention": Case(*sequences(40, 90, causal=True)),
    "attention long": Case(*sequences(80, 150, dim=64, dtype=BF16, causal=True), many=(2,)),
    "attention_varlen": Case(*packed(5, 150, causal=True, window_size=(70, 0)), many=(2, 6)),
    "attention_varlen bf16": Case(*packed(70, 90, BF16, 64, causal=True), many=(3,), emulated=("sm_80",)),
    "merge_attention": Case(*merged(), emulated=("sm_80",)),
    "paged_attention": Case(*paged(1, 600, neighbours=(1, 3000)), many=(6,), differs=("triton", 6)),
    "paged_attention chunk": Case(*paged(9, 100, neighbours=(30, 100), window_size=(50, -1)), many=(2, 5)),
    "rotary": Case(*rotated(), emulated=()),
    "write_kv_cache": Case(*written(F32), emulated=()),
    "write_kv_cache int8": Case(*written(torch.int8), emulated=()),
    "rotary_write_kv_cache": Case(*written(FP8, turned=True), emulated=("sm_90a",)),
}
