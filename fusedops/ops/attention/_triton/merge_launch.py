"""Launch the kernel that joins two results of attention: its tile by arithmetic."""

import functools
from dataclasses import dataclass

from fusedops._core import rows
from fusedops._core.device import limits
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div, power_of_2
from fusedops._core.tuning import Tunable
from fusedops.ops.attention._triton import split_kv


@dataclass(frozen=True)
class JoinConfig:
    """A tile of block_m rows of all head dims, padded to a power of two."""

    block_m: int
    block_dv: int
    num_warps: int = 1


@functools.lru_cache(maxsize=64)
def default(head_dim_v, device_limits=None):
    """One warp, of which each thread reads 16 values of a state."""
    block_dv = power_of_2(head_dim_v)
    return JoinConfig(max(512 // block_dv, 1), block_dv)


def _fits(tile, head_dim_v, device_limits):
    """Whether a thread has wide accesses, and registers for its values."""
    values = tile.block_m * tile.block_dv // (32 * tile.num_warps)
    return rows.MIN_VALUES <= values <= rows.MAX_VALUES


# Rows are joined alone and nothing is summed over values: a result has the same bits whatever the table says.
TILE = Tunable(
    "merge_attention",
    default=lambda *asked: default(*asked),
    sizes=("head_dim_v",),
    also=("dtype",),
    space={"block_m": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8)},
    fits=_fits,
    source=(__file__, split_kv.__file__),
)


def config(device_limits, out_a, *rest):
    """The configuration of one call."""
    return TILE.choose(device_limits, out_a.shape[-1:], (out_a.dtype,))


def merge_attention(out_a, lse_a, out_b, lse_b):
    """Launch the kernel."""
    length, heads, dv = out_a.shape[-3:]
    out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    if out.numel() == 0:
        return out, lse
    tile = config(limits(out_a.device), out_a)
    (out_a, out_b), (num_rows, inner, strides) = rows.stridable(rows.dense(out_a), rows.dense(out_b))
    split_kv._merge_kernel[(ceil_div(num_rows, tile.block_m),)](
        out_a, lse_a.contiguous(), out_b, lse_b.contiguous(), out, lse, *strides, length, heads, num_rows, inner,
        DV=dv, BLOCK_M=tile.block_m, BLOCK_DV=tile.block_dv, num_warps=tile.num_warps,
    )  # fmt: skip
    return out, lse


def example(dtype):
    """A launch on contiguous rows of 128 values."""
    tile = default(128)
    pointers = {f"{name}_ptr": f"*{dtype if 'out' in name else 'fp32'}" for name in
                ("out_a", "lse_a", "out_b", "lse_b", "out", "lse")}  # fmt: skip
    strides = {f"stride_{side}_{part}": "i32" for side in "ab" for part in ("outer", "inner")}
    return KernelExample(
        split_kv._merge_kernel, {**pointers, **strides, **dict.fromkeys(("S", "H", "num_rows"), "i32")},
        {"inner": 1, "DV": 128, "BLOCK_M": tile.block_m, "BLOCK_DV": tile.block_dv}, divisible=(*pointers, *strides),
        num_warps=tile.num_warps,
    )  # fmt: skip
