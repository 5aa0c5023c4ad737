"""Launch the Hopper kernel: which calls it takes, its tile, and its tensor maps."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedops._core.device import INTERPRETER
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div
from fusedops._core.tuning import Tunable

ARCH = "sm_90a"
FP8 = torch.float8_e4m3fn
BLOCK_M, BLOCK_K = 128, 128  # two warpgroups of 64 rows; bytes of a row of the widest swizzle
ALIGNMENT = 16  # bytes of every address and stride of a tensor map
MAX_REGISTERS = 168  # of a thread at the start; warps then give to each other what they need


@dataclass(frozen=True)
class HopperConfig:
    """Tiles of 128 rows and block_n columns, through a ring of num_stages depth blocks of 128.

    group_m rows of tiles are walked through together.
    """

    block_n: int
    num_stages: int
    group_m: int = 8


@functools.lru_cache(maxsize=4096)
def default(rows, columns, is_int, device_limits):
    """The columns with which the last round of tiles ends first, and the stages that the shared memory holds.

    256 columns of integers fill the registers; of float8 128 do, with the sum of a depth block beside.
    """

    def rounds(block_n):
        tiles = ceil_div(rows, BLOCK_M) * ceil_div(columns, block_n)
        return ceil_div(tiles, device_limits.sm_count) * block_n

    block_n = min(_widths(is_int), key=rounds)
    free = device_limits.shared_memory - shared_bytes(HopperConfig(block_n, 0))
    return HopperConfig(block_n, min(free // ((BLOCK_M + block_n) * BLOCK_K), 6))


def _widths(is_int):
    return (256, 128, 64) if is_int else (128, 64)


def shared_bytes(tile):
    """The ring of both operands, 16-bit results that pass through in halves, and barriers."""
    return tile.num_stages * (BLOCK_M + tile.block_n) * BLOCK_K + 128 * min(tile.block_n, 128) + 1024


def _fits(tile, rows, columns, depth, is_int, device_limits):
    return tile.block_n in _widths(is_int) and shared_bytes(tile) <= device_limits.shared_memory


# A depth block's sum is made alone and blocks are added in order: a result has the same bits whatever the table says.
TILE = Tunable(
    "scaled_matmul_hopper",
    default=lambda rows, columns, depth, is_int, device_limits: default(rows, columns, is_int, device_limits),
    sizes=("rows", "columns", "depth"),
    flags=("is_int",),
    also=("dtype", "out_dtype", "scale_a", "scale_b", "bias", "residual", "activation", "gated"),
    space={"block_n": (64, 128, 256), "num_stages": (3, 4, 5, 6, 7), "group_m": (4, 8, 16)},
    fits=_fits,
    source=str(Path(__file__).with_name("__init__.py")),  # all files of the kernels
)


def rejection(device_limits, a, b):
    """Why the Hopper kernel does not take a call, or None."""
    if device_limits.arch != ARCH or device_limits is INTERPRETER:
        return f"needs {ARCH}"
    if not (_mappable(a) and _mappable(b)):
        return f"addresses and strides must be multiples of {ALIGNMENT} bytes, and no stride may be 0"
    return None


def _mappable(tensor):
    """Whether a tensor map can describe the tensor, whose elements are bytes."""
    rows, depth = tensor.shape
    stride = tensor.stride(0) if rows > 1 else depth
    return tensor.data_ptr() % ALIGNMENT == 0 and stride % ALIGNMENT == 0 and stride >= depth


def _tensor_map(tensor, rows):
    """Tiles of rows x BLOCK_K of a matrix."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    stride = tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]
    return TensorDescriptor(tensor, list(tensor.shape), [stride, 1], [rows, BLOCK_K], _layout())


def _layout():
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


def launch(tile, tensors, numbers, kinds, sm_count):
    """Run the kernel; arguments as the other kernels have them."""
    from fusedops.ops.scaled_matmul._triton.hopper import _scaled_matmul_hopper_kernel

    a, b, scale_a, scale_b, bias, residual, out = tensors
    _, _, *rest = numbers
    tiles = ceil_div(len(a), BLOCK_M) * ceil_div(len(b), tile.block_n)
    _scaled_matmul_hopper_kernel[(min(sm_count, tiles),)](
        _tensor_map(a, BLOCK_M), _tensor_map(b, tile.block_n), scale_a, scale_b,
        scale_a if bias is None else bias, out if residual is None else residual, out, *rest,
        **kinds, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        BLOCK_N=tile.block_n, BLOCK_K=BLOCK_K, GROUP_M=tile.group_m, NUM_STAGES=tile.num_stages,
        num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def example(dtype, target, code, shape, kinds, full):
    """A launch on codes; with `full` also bias and residual."""
    from fusedops.ops.scaled_matmul._triton.hopper import _scaled_matmul_hopper_kernel

    tile = default(*shape[:2], code == "i8", target)
    types = {
        f"{name}_desc": f"tensordesc<{code}[{rows},{BLOCK_K}],{_layout()!r}>"
        for name, rows in (("a", BLOCK_M), ("b", tile.block_n))
    }
    types |= dict.fromkeys(("scale_a_ptr", "scale_b_ptr"), "*fp32")
    types |= dict.fromkeys(("out_ptr", "residual_ptr"), f"*{dtype}")
    types |= {"bias_ptr": f"*{dtype}" if full else "*fp32"}
    constants = {
        **kinds, "HAS_BIAS": full, "HAS_RESIDUAL": full, "BLOCK_N": tile.block_n, "BLOCK_K": BLOCK_K,
        "GROUP_M": tile.group_m, "NUM_STAGES": tile.num_stages,
    }  # fmt: skip
    names = [name for name in _scaled_matmul_hopper_kernel.arg_names if name not in constants]
    divisible = [name for name in names if name != "M" and not name.endswith("_desc")]
    return KernelExample(
        _scaled_matmul_hopper_kernel, {name: types.get(name, "i32") for name in names}, constants,
        divisible=tuple(divisible), num_warps=4, max_registers=MAX_REGISTERS,
    )  # fmt: skip
