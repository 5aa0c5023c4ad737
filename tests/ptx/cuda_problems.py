"""What the kernels of tests/ptx/cuda are run on: arguments, launch and the right result, for each of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fusedops.testing import ptx
from tests.ptx.cuda import build


@dataclass
class Launch:
    """One launch. `out` is compared with `expected`; they may differ by `allowed` (a tensor, or 0)."""

    kernel: str
    file: tuple[str, str]  # source and target
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: list
    names: tuple[str, ...]
    out: torch.Tensor
    expected: torch.Tensor
    allowed: torch.Tensor | float = 0
    shared: int = 0
    cluster: tuple[int, ...] = (1, 1, 1)
    read_only: tuple[int, ...] = ()
    memory: list = field(default_factory=list)
    further: list = field(default_factory=list)  # (tensor, expected) of other results

    def text(self):
        return build.ptx_path(*self.file).read_text()

    def run(self, schedule, edit: Callable[[str], str] = lambda text: text):
        """Run it; `edit` changes the PTX first. Raises ptx.Fault."""
        ptx.load(edit(self.text())).launch(
            self.kernel, self.grid, self.block, self.arguments, shared=self.shared, cluster=self.cluster,
            schedule=schedule, read_only=self.read_only, names=self.names, memory=self.memory,
        )  # fmt: skip

    def right(self):
        """Whether every result is what it should be."""
        pairs = [(self.out, self.expected, self.allowed), *((out, expected, 0) for out, expected in self.further)]
        return all(bool(((out.double() - right.double()).abs() <= allowed).all()) for out, right, allowed in pairs)


def integers(generator, *shape, low=-3, high=4):
    return torch.randint(low, high, shape, generator=generator).float()


def operands(dtype, m, n, k, random):
    """a [m, k] and b [n, k]: small integers, so that every sum is exact, or random values."""
    generator = torch.Generator().manual_seed(m * n + k)
    draw = torch.randn if random else lambda *shape, generator: integers(generator, *shape)
    scale = 40 if random and dtype == torch.int8 else 1
    return [(draw(rows, k, generator=generator) * scale).to(dtype) for rows in (m, n)]


def product(a, b):
    """a @ b.T, and by how much a float32 sum may miss it; integers are exact."""
    a, b = a.double(), b.double()
    whole = bool((a == a.round()).all() and (b == b.round()).all())
    return a @ b.T, 0 if whole else a.shape[1] * 2.0**-23 * (a.abs() @ b.abs().T)


def pruned(m, k, random):
    """Two of each four columns: dense a [m, k] with zeros, the kept values [m, k / 2], and metadata [m, k / 16]."""
    generator = torch.Generator().manual_seed(m + k)
    (dense, _) = operands(torch.bfloat16, m, 1, k, random)
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    kept = pairs[torch.randint(0, 6, (m, k // 4), generator=generator)]
    groups = dense.view(m, k // 4, 4)
    values = groups.gather(2, kept)
    dense = torch.zeros_like(groups).scatter(2, kept, values).view(m, k)
    codes = (kept[..., 0] | kept[..., 1] << 2).view(m, k // 16, 4)
    metadata = (codes << torch.tensor([0, 4, 8, 12])).sum(2)
    return dense, values.reshape(m, k // 2).contiguous(), metadata.to(torch.int32).to(torch.uint16)


_MMA = {torch.bfloat16: "bf16", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def gemm_mma(m, n, k, dtype=torch.bfloat16, random=False):
    a, b = operands(dtype, m, n, k, random)
    expected, allowed = product(a, b)
    out = torch.full((m, n), -1, dtype=torch.int32) if dtype == torch.int8 else torch.full((m, n), torch.nan)
    target = "sm_89" if dtype == torch.float8_e4m3fn else "sm_80"
    return Launch(
        f"gemm_{_MMA[dtype]}_mma", ("gemm_mma", target), (-(-n // 64), -(-m // 64)), (128,), [a, b, out, m, n, k],
        ("a", "b", "out", "M", "N", "K"), out, expected, allowed, shared=2 * 2 * 64 * 64, read_only=(0, 1),
    )  # fmt: skip


def gemm_sparse_mma(m, n, k, random=False):
    dense, values, metadata = pruned(m, k, random)
    (_, b) = operands(torch.bfloat16, m, n, k, random)
    expected, allowed = product(dense, b)
    out = torch.full((m, n), torch.nan)
    return Launch(
        "gemm_sparse_bf16_mma", ("gemm_sparse_mma", "sm_80"), (n // 64, m // 64), (128,),
        [values, metadata, b, out, m, n, k], ("values", "metadata", "b", "out", "M", "N", "K"), out, expected, allowed,
        shared=64 * 64 + 64 * 128, read_only=(0, 1, 2),
    )  # fmt: skip


def gemm_wgmma(m, n, k, dtype=torch.bfloat16, random=False):
    a, b = operands(dtype, m, n, k, random)
    expected, allowed = product(a, b)
    out = torch.full((m, n), -1, dtype=torch.int32) if dtype == torch.int8 else torch.full((m, n), torch.nan)
    block_k = 128 // a.element_size()
    maps = [ptx.encode_tiled(x, (rows, block_k), swizzle=128) for x, rows in ((a, 128), (b, 64))]
    return Launch(
        f"gemm_{_MMA[dtype]}_wgmma", ("gemm_wgmma", "sm_90a"), (-(-n // 64), -(-m // 128)), (384,),
        [*maps, out, m, n, k], ("a_map", "b_map", "out", "M", "N", "K"), out, expected, allowed,
        shared=3 * (128 + 64) * 128 + 6 * 8, memory=[("a", a, False), ("b", b, False)],
    )  # fmt: skip


def gemm_sparse_wgmma(m, n, k, random=False):
    dense, values, metadata = pruned(m, k, random)
    (_, b) = operands(torch.bfloat16, m, n, k, random)
    expected, allowed = product(dense, b)
    out = torch.full((m, n), torch.nan)
    maps = [ptx.encode_tiled(x, (64, 64), swizzle=128) for x in (values, b)]
    return Launch(
        "gemm_sparse_bf16_wgmma", ("gemm_sparse_wgmma", "sm_90a"), (n // 64, m // 64), (128,),
        [*maps, metadata, out, m, n, k], ("values_map", "b_map", "metadata", "out", "M", "N", "K"), out, expected,
        allowed, shared=3 * 64 * 128 + 8, read_only=(2,), memory=[("values", values, False), ("b", b, False)],
    )  # fmt: skip


def gemm_registers_wgmma(m, n, k, random=False):
    a, b = operands(torch.bfloat16, m, n, k, random)
    expected, allowed = product(a, b)
    b = b.T.contiguous()
    out = torch.full((m, n), torch.nan)
    return Launch(
        "gemm_registers_bf16_wgmma", ("gemm_registers_wgmma", "sm_90a"), (n // 128, m // 64), (128,),
        [a, ptx.encode_tiled(b, (64, 64), swizzle=128), out, m, n, k], ("a", "b_map", "out", "M", "N", "K"),
        out, expected, allowed, shared=2 * 64 * 128 + 8, read_only=(0,), memory=[("b", b, False)],
    )  # fmt: skip


def cluster_matvec(m, k, size):
    generator = torch.Generator().manual_seed(m + k)
    x, weight = integers(generator, m, k), integers(generator, k)
    out = torch.full((m,), torch.nan)
    blocks = -(-m // 64 // size) * size
    return Launch(
        "cluster_matvec", ("cluster", "sm_90a"), (blocks,), (64,),
        [x, ptx.encode_tiled(weight, (128 // size,)), out, m, k], ("x", "weight_map", "out", "M", "K"), out, x @ weight,
        cluster=(size,), read_only=(0,), memory=[("weight", weight, False)],
    )  # fmt: skip


def cluster_column_sum(m, n, size):
    x = integers(torch.Generator().manual_seed(m + n), m, n)
    out = torch.full((n,), torch.nan)
    return Launch(
        "cluster_column_sum", ("cluster", "sm_90a"), (-(-n // 64) * size,), (64,), [x, out, m, n],
        ("x", "out", "M", "N"), out, x.sum(0), cluster=(size,), read_only=(0,),
    )  # fmt: skip


def grouped_scale(lengths, n):
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = integers(torch.Generator().manual_seed(n), sum(lengths), n)
    out = torch.full_like(x, torch.nan)
    maps = torch.zeros(len(lengths) * 2 * 128 + 128, dtype=torch.uint8)
    maps = maps[-maps.data_ptr() % 128 :][: len(lengths) * 2 * 128]
    return Launch(
        "grouped_scale", ("tensor_map", "sm_90a"), (len(lengths),), (32,),
        [ptx.encode_tiled(x, (32, 32)), x, offsets, out, maps, n, 3.0],
        ("like", "x", "offsets", "out", "maps", "N", "factor"), out, x * 3, read_only=(1, 2),
    )  # fmt: skip


def bulk_axpy(n):
    generator = torch.Generator().manual_seed(n)
    x, out = integers(generator, n), integers(generator, n)
    scaled, expected = torch.full_like(x, torch.nan), out + 2 * x
    return Launch(
        "bulk_axpy", ("bulk", "sm_90a"), (-(-n // 256),), (64,), [x, scaled, out, n, 2.0],
        ("x", "scaled", "out", "n", "alpha"), out, expected, read_only=(0,), further=[(scaled, 2 * x)],
    )  # fmt: skip


def ragged_row_sum(rows):
    generator = torch.Generator().manual_seed(rows)
    x = integers(generator, rows, 32)
    lengths = (torch.arange(rows) * 7 % 33).to(torch.int32)
    out = torch.full((rows,), torch.nan)
    expected = (x * (torch.arange(32) < lengths[:, None])).sum(1)
    return Launch(
        "ragged_row_sum", ("warp", "sm_80"), (-(-rows // 4),), (128,), [x, lengths, out, rows],
        ("x", "lengths", "out", "num_rows"), out, expected, read_only=(0, 1),
    )  # fmt: skip


def sum_by_key(n, keys):
    generator = torch.Generator().manual_seed(n)
    key = torch.randint(0, keys, (n,), generator=generator, dtype=torch.int32)
    value = torch.randint(-99, 100, (n,), generator=generator, dtype=torch.int32)
    out = torch.zeros(keys, dtype=torch.int32)
    return Launch(
        "sum_by_key", ("warp", "sm_80"), (-(-n // 96),), (96,), [key, value, out, n], ("keys", "values", "out", "n"),
        out, torch.zeros(keys, dtype=torch.int32).index_add(0, key, value), read_only=(0, 1),
    )  # fmt: skip


def ping_pong_sum(m):
    x = integers(torch.Generator().manual_seed(m), m, 32)
    out = torch.full((32,), torch.nan)
    return Launch(
        "ping_pong_sum", ("warp", "sm_80"), (1,), (64,), [x, out, m], ("x", "out", "M"), out, x.sum(0), read_only=(0,)
    )


def histogram(n):
    x = torch.randint(0, 64, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    out = torch.zeros(64, dtype=torch.int32)
    return Launch(
        "histogram", ("blocks", "sm_80"), (3,), (128,), [x, out, n], ("x", "out", "n"), out,
        torch.bincount(x, minlength=64), read_only=(0,),
    )  # fmt: skip


def scale_vectors(n):
    x = integers(torch.Generator().manual_seed(n), n)
    out = torch.full_like(x, torch.nan)
    return Launch(
        "scale_vectors", ("blocks", "sm_80"), (-(-n // 256),), (64,), [x, out, n, 0.5], ("x", "out", "n", "factor"),
        out, x / 2, read_only=(0,),
    )  # fmt: skip


def gemm_split_k(m, n, k, parts):
    generator = torch.Generator().manual_seed(m)
    a, b = integers(generator, m, k), integers(generator, k, n)
    out, partial = torch.full((m, n), torch.nan), torch.full((parts, m, n), torch.nan)
    tiles = (-(-n // 16), -(-m // 16))
    semaphore = torch.zeros(tiles[0] * tiles[1], dtype=torch.int32)
    return Launch(
        "gemm_split_k", ("blocks", "sm_80"), (*tiles, parts), (16, 16), [a, b, out, partial, semaphore, m, n, k],
        ("a", "b", "out", "partial", "semaphore", "M", "N", "K"), out, a @ b, read_only=(0, 1),
        further=[(semaphore, torch.zeros_like(semaphore))],
    )  # fmt: skip
