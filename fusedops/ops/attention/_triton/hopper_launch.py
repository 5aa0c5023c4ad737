"""Launch the Hopper kernel: which calls it takes, its tile, tensor maps and order of work."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedops._core.device import INTERPRETER, MIB
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div, power_of_2
from fusedops._core.tl import LOG2E
from fusedops._core.tuning import Tunable

ARCH = "sm_90a"
FP8 = torch.float8_e4m3fn
MAX_D = 256
MIN_QUERIES = 64  # a warpgroup's rows; fewer are better packed with their group's heads
SECTION_BYTES = 16 * MIB  # of keys and values that blocks at work together should find in the L2 cache
ALIGNMENT = 16  # bytes of every address and stride of a tensor map
# Of one thread: what is left beside scores, probabilities and sums is for addresses, maxima and masks.
MAX_SUMS = {2: 176, 3: 128}
_LOG2E = LOG2E.value


@dataclass(frozen=True)
class HopperConfig:
    """num_groups warpgroups of 64 queries each, rings of num_stages tiles of block_n keys, head dims padded.

    With out_in_q the result leaves through Q's tile, where both would not fit beside the rings.
    """

    num_groups: int
    block_n: int
    block_d: int
    block_dv: int
    num_stages: int
    out_in_q: bool

    @property
    def max_registers(self):
        """Registers of a thread at the start; warps then give to each other what they need."""
        return 168 if self.num_groups == 2 else 128


def default(head_dim, head_dim_v, itemsize, plain):
    """Three warpgroups where a narrow head leaves them registers, keys by what their scores take of those.

    `plain`: no left window, softcap, sink or packed sequences.
    """
    block_d, block_dv = (max(64, power_of_2(size)) for size in (head_dim, head_dim_v))
    num_groups = 3 if plain and block_d == block_dv == 64 else 2
    block_n = 64 if max(block_d, block_dv) == MAX_D else 128
    return HopperConfig(num_groups, block_n, block_d, block_dv, 2, block_d == block_dv == MAX_D and itemsize == 2)


def shared_bytes(tile, itemsize):
    """Q's tiles, the rings of keys and values, the result's tiles where it does not leave through Q's, barriers."""
    queries = 64 * tile.num_groups
    out = 0 if tile.out_in_q else queries * tile.block_dv * 2
    ring = tile.num_stages * tile.block_n * (tile.block_d * itemsize + tile.block_dv * 2)
    return queries * tile.block_d * itemsize + out + ring + 512


def _fits(tile, queries, keys, head_dim, head_dim_v, itemsize, plain, device_limits):
    """Whether the memory holds the tiles, and the registers of a thread what it keeps between two key tiles."""
    sums = tile.block_n // 2 + tile.block_n // 4 + tile.block_dv // 2
    return (
        shared_bytes(tile, itemsize) <= device_limits.shared_memory
        and sums <= MAX_SUMS[tile.num_groups]
        and (plain or tile.num_groups == 2)
    )


TILE = Tunable(
    "attention_hopper",
    default=lambda queries, keys, *asked: default(*asked[:-1]),
    sizes=("queries", "keys"),
    flags=("head_dim", "head_dim_v", "itemsize", "plain"),
    also=("dtype", "heads", "key_heads", "batch", "varlen", "left", "right", "softcap", "sinks", "scales"),
    space={"num_groups": (2, 3), "block_n": (64, 128), "num_stages": (2, 3, 4)},
    fits=_fits,
    source=str(Path(__file__).with_name("__init__.py")),  # all files of the kernels
)


def rejection(device_limits, q, k, v, varlen, max_q, left, options):
    """Why the Hopper kernel does not take a call, or None. `left`: the window hides keys on the left."""
    _, alibi_slopes, mask, q_scale, k_scale, v_scale, softmax_scale = options[:7]
    softcap = options[10]
    if device_limits.arch != ARCH or device_limits is INTERPRETER:
        return f"needs {ARCH}"
    if q.dtype not in (torch.float16, torch.bfloat16, FP8):
        return "needs inputs of 16 or 8 bits"
    if not (alibi_slopes is mask is None):
        return "takes no ALiBi and no mask"
    if softcap > 0.0 and not (q_scale is k_scale is v_scale is None):
        return "takes no scales with a softcap"
    width = max(q.shape[-1], v.shape[-1])
    if width > MAX_D:
        return f"head dims must be at most {MAX_D}"
    if width > 128 and (left or varlen):
        return "head dims above 128 leave no registers for a left window or packed sequences"
    if max_q < MIN_QUERIES:
        return f"needs at least {MIN_QUERIES} queries"
    if softmax_scale <= 0.0:
        return "needs a positive softmax_scale"
    if not all(mappable(tensor) for tensor in (q, k, v)):
        return f"addresses and strides must be multiples of {ALIGNMENT} bytes, no size and no stride may be 0"
    return None


def config(device_limits, q, k, v, varlen, max_q, max_k, bounds, options):
    """The configuration of a call that `rejection` has nothing against."""
    left, right = (bound is not None for bound in bounds)
    sinks, scaled, capped = options[0] is not None, any(t is not None for t in options[3:6]), options[10] != 0.0
    plain = not (varlen or left or capped or sinks or scaled)
    asked = max_q, max_k, q.shape[-1], v.shape[-1], q.element_size(), plain
    batch = None if varlen else q.shape[0]
    also = q.dtype, q.shape[-2], k.shape[-2], batch, varlen, left, right, capped, sinks, scaled
    return TILE.choose(device_limits, asked, also)


def mappable(tensor):
    """Whether a tensor map can describe the tensor."""
    if tensor.numel() == 0 or tensor.data_ptr() % ALIGNMENT:
        return False
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]):
        if size > 1 and (stride == 0 or stride * tensor.element_size() % ALIGNMENT):
            return False
    return tensor.stride(-1) == 1


def _layout(dtype, columns):
    from triton.experimental.gluon import language as gl

    swizzle = min(128, columns * dtype.itemsize)
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=dtype.itemsize * 8, rank=4)


def _tensor_map(tensor, rows, columns):
    """Tiles of rows x columns of every head of a tensor [B, S, H, D]."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    tensor = tensor.transpose(1, 2)
    aligned = ALIGNMENT // tensor.element_size()
    strides = [stride if size > 1 else aligned for size, stride in zip(tensor.shape[:-1], tensor.stride())]
    layout = _layout(tensor.dtype, columns)
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns], layout)


@functools.lru_cache(maxsize=4096)
def _section(batch_kv_heads, group, kv_bytes):
    """Query heads of a section: all whose keys and values fit into SECTION_BYTES together, in equal sections."""
    most = max(1, SECTION_BYTES // max(kv_bytes, 1))
    return group * max(size for size in range(1, batch_kv_heads + 1) if batch_kv_heads % size == 0 and size <= most)


def _scales(q, k, scales):
    """(whether there are any, 1 where each sequence has its own else 0, the tables with ones for those left out)."""
    if all(scale is None for scale in scales):
        return False, 0, scales
    heads, kv_heads = q.shape[-2], k.shape[-2]
    given = next(scale for scale in scales if scale is not None)
    tables = [given.new_ones((1, n)) if scale is None else scale.reshape(-1, n)
              for scale, n in zip(scales, (heads, kv_heads, kv_heads))]  # fmt: skip
    rows = max(table.shape[0] for table in tables)
    return True, int(rows > 1), [table.expand(rows, -1).contiguous() for table in tables]


def launch(tile, q, k, v, cu_seqlens_q, cu_seqlens_k, batch, max_q, max_k, bounds, out, lse,
           sinks, scales, softmax_scale, softcap, sm_count):  # fmt: skip
    """Run the kernel. `bounds`: keys that a query sees to its left and right, None for all.

    8-bit values are made 16-bit first, which is exact: so is then the product with 16-bit probabilities, and V's
    bytes are few beside the products.
    """
    from fusedops.ops.attention._triton.hopper import _attention_hopper_kernel

    varlen = cu_seqlens_q is not None
    v = v.to(out.dtype)
    sinks = None if sinks is None else sinks.contiguous()
    scaled, scale_rows, scales = _scales(q, k, scales)
    if varlen:
        q, k, v, out = (tensor[None] for tensor in (q, k, v, out))
    left, right = bounds
    heads, kv_heads = q.shape[2], k.shape[2]
    group = heads // kv_heads
    num_m = ceil_div(max_q, 64 * tile.num_groups)
    num_tiles = num_m * batch * heads
    ragged = varlen or right is not None  # then all heads take turns, so that work is shared out by length
    kv_bytes = max_k * (k.shape[3] + v.shape[3]) * k.element_size()
    section = batch * heads if ragged else _section(batch * kv_heads, group, kv_bytes)
    capped = softcap > 0.0
    _attention_hopper_kernel[(min(sm_count, num_tiles),)](
        _tensor_map(q, 64, tile.block_d), _tensor_map(k, tile.block_n, tile.block_d),
        _tensor_map(v, tile.block_n, tile.block_dv), _tensor_map(out, 64, tile.block_dv),
        out, lse, sinks, *scales, cu_seqlens_q, cu_seqlens_k,
        lse.shape[-1], max_q, max_k, heads, num_m, num_tiles, section,
        left or 0, max_q if right is None else right, group, scale_rows,
        1.0 if capped else softmax_scale * _LOG2E, 2.0 * softmax_scale / softcap * _LOG2E if capped else 0.0,
        softcap * _LOG2E,
        DV=v.shape[3], BLOCK_N=tile.block_n, IS_VARLEN=varlen, HAS_LEFT=left is not None,
        HAS_SOFTCAP=capped, HAS_SCALES=scaled, HAS_SINKS=sinks is not None,
        NUM_GROUPS=tile.num_groups, NUM_STAGES=tile.num_stages, OUT_IN_Q=tile.out_in_q,
        num_warps=4, maxnreg=tile.max_registers,
    )  # fmt: skip


def examples(dtype, target):
    """Every padded head dim, plain and with the options that it takes."""
    if target.arch != ARCH or dtype == "fp32":
        return
    options = {"HAS_SOFTCAP": True, "HAS_SINKS": True}
    everything = {"HAS_LEFT": True, "IS_VARLEN": True, **options}
    yield _example(dtype, 64, 64, {})
    yield _example(dtype, 128, 128, {})
    yield _example(dtype, 128, 128, everything)
    if dtype == "bf16":
        yield _example(dtype, 256, 256, {})
        yield _example(dtype, 256, 256, options)
        yield _example(dtype, 192, 128, {})
        yield _example(dtype, 64, 64, everything)
        yield _example(dtype, 64, 64, {"IS_VARLEN": True})
        yield _example("fp8e4nv", 64, 64, {"HAS_SCALES": True})
        yield _example("fp8e4nv", 128, 128, {"HAS_SCALES": True})
        yield _example("fp8e4nv", 128, 128, {"HAS_SCALES": True, **dict.fromkeys(("HAS_LEFT", "IS_VARLEN"), True)})
        yield _example("fp8e4nv", 256, 256, {"HAS_SCALES": True})


_SWITCHES = ("IS_VARLEN", "HAS_LEFT", "HAS_SOFTCAP", "HAS_SCALES", "HAS_SINKS")
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": FP8}


def _example(dtype, head_dim, head_dim_v, switches):
    """A launch with what the switches name."""
    from fusedops.ops.attention._triton.hopper import _attention_hopper_kernel

    switches = {name: switches.get(name, False) for name in _SWITCHES}
    tile = default(head_dim, head_dim_v, _DTYPES[dtype].itemsize, plain=not any(switches.values()))
    wide = "bf16" if dtype == "fp8e4nv" else dtype
    tiles = {"q": (dtype, 64, tile.block_d), "k": (dtype, tile.block_n, tile.block_d),
             "v": (wide, tile.block_n, tile.block_dv), "out": (wide, 64, tile.block_dv)}  # fmt: skip
    types = {
        f"{name}_desc": f"tensordesc<{kind}[1,1,{rows},{columns}],{_layout(_DTYPES[kind], columns)!r}>"
        for name, (kind, rows, columns) in tiles.items()
    }
    types |= {"out_ptr": f"*{wide}", "lse_ptr": "*fp32"}
    types |= dict.fromkeys(("scale_log2", "softcap_scale", "softcap_log2"), "fp32")
    constants = {
        **switches, "DV": head_dim_v, "BLOCK_N": tile.block_n, "NUM_GROUPS": tile.num_groups,
        "NUM_STAGES": tile.num_stages, "OUT_IN_Q": tile.out_in_q,
    }  # fmt: skip
    optional = (
        ("HAS_SINKS", "*fp32", ("sinks_ptr",)),
        ("HAS_SCALES", "*fp32", ("q_scale_ptr", "k_scale_ptr", "v_scale_ptr")),
        ("IS_VARLEN", "*i32", ("cu_q_ptr", "cu_k_ptr")),
    )
    for switch, kind, names in optional:
        for name in names:
            if switches[switch]:
                types[name] = kind
            else:
                constants[name] = None
    names = [name for name in _attention_hopper_kernel.arg_names if name not in constants]
    return KernelExample(
        _attention_hopper_kernel, {name: types.get(name, "i32") for name in names}, constants,
        divisible=("out_ptr", "lse_ptr"), num_warps=4, max_registers=tile.max_registers,
    )  # fmt: skip
