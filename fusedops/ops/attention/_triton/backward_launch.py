"""Launch the backward kernels: tiles by arithmetic, layouts, and the sum of the sinks' gradients."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fusedops._core.device import KIB, limits
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div, power_of_2
from fusedops._core.rows import dense
from fusedops._core.tuning import Tunable
from fusedops.ops.attention._triton.backward import (
    _attention_delta_kernel,
    _attention_dkdv_kernel,
    _attention_dq_kernel,
)

FLOAT32_512_SHARED = 129 * KIB  # four tiles of 16 rows of 512 columns
LARGE_SHARED = 200 * KIB  # from here on the tiles are those of warpgroup products
DELTA_ELEMENTS = 8192  # of out and of grad_out in one program's registers
MAX_SUMS = 192  # of one thread, with the tiles of scores beside them
FLOAT32_SCORES = 1024  # of a tile in float32, whose products' operands stand in registers


@dataclass(frozen=True)
class BackwardConfig:
    """Tile of queries and keys of one kernel, and how it runs. In two passes dv is summed first, then dk."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    two_passes: bool = False


def default(width, element_size, has_softcap, mask_kind, device_limits):
    """(dk and dv's configuration, dq's) for head dims padded to `width`.

    The two sums of width columns and the two tiles of scores live in registers, 255 for each thread. A softcap and a
    mask keep more of each score and take the room of half a tile; an additive mask that of another half.
    """
    if element_size == 4:
        if width > 256 and device_limits.shared_memory < FLOAT32_512_SHARED:
            raise NotImplementedError(
                f"attention_backward: head dims beyond 256 in float32 need {FLOAT32_512_SHARED} bytes of shared "
                f"memory, {device_limits.name} has {device_limits.shared_memory}"
            )
        if width <= 64:
            return BackwardConfig(32, 32, 4, 1), BackwardConfig(32, 32, 4, 1)
        if width <= 128:
            return BackwardConfig(16, 32, 8, 1), BackwardConfig(32, 16, 8, 1)
        return BackwardConfig(16, 16, 8, 1, width > 256), BackwardConfig(16, 16, 8, 1)
    if width > 256:
        return BackwardConfig(16, 32, 8, 1, True), BackwardConfig(32, 16, 8, 1)
    small = has_softcap or mask_kind != "none"
    step = 32 if small else 64
    if device_limits.shared_memory >= LARGE_SHARED:
        if width <= 64 and not small:  # measured on an H100, as the next
            return BackwardConfig(64, 64, 4, 3), BackwardConfig(64, 64, 4, 2)
        if width <= 128 and not small:
            return BackwardConfig(64, 128, 8, 2), BackwardConfig(128, 64, 8, 3)
        if width <= 128:
            block_n = 64 if mask_kind == "additive" else 128
            return BackwardConfig(step, block_n, 8, 2), BackwardConfig(128, step, 8, 2)
        return BackwardConfig(step // 2, 128, 8, 2, True), BackwardConfig(2 * step, 32, 8, 2)
    if width <= 64:
        return BackwardConfig(step, 64, 8 if small else 4, 2), BackwardConfig(128, step, 8, 2)
    if width <= 128:
        return BackwardConfig(step, 64, 8, 2), BackwardConfig(2 * step, 32, 8, 2)
    if device_limits.shared_memory >= 128 * KIB:
        return BackwardConfig(32, step, 8, 2), BackwardConfig(step, 32, 8, 2)
    return BackwardConfig(32, 32, 8, 2), BackwardConfig(32, 32, 4, 2)


def shared_bytes(resident, moving, num_stages, width, itemsize, has_mask, device_limits):
    """At most what a kernel asks for: a tile of two tensors of `width` columns together that stays, tiles of two
    others on their way, two of products, masks, rows of numbers."""
    is_asynchronous = 90 <= device_limits.capability < 120
    tiles = num_stages if is_asynchronous else max(num_stages - 1, 1)
    product = resident * moving
    mask = tiles * product * 4 * (has_mask and num_stages > 1)  # else it goes to registers at once
    # mma.sync takes one of the products from registers
    products = product * itemsize * (2 if is_asynchronous or itemsize == 4 else 1)
    rows = tiles * max(resident, moving) * 8 + 512
    return (resident + tiles * moving) * width * itemsize + products + mask + rows


def _fits(tile, resident, moving, sums, width, itemsize, has_softcap, mask_kind, device_limits):
    """Whether the memory holds the tiles, and the registers of a thread the sums and two tiles of scores."""
    has_mask, threads = mask_kind != "none", 32 * tile.num_warps
    scores = resident * moving // threads * (2 + has_softcap + has_mask)
    narrow = itemsize == 2 and width <= 256 and min(resident, moving) < 32
    return (
        shared_bytes(resident, moving, tile.num_stages, 2 * width, itemsize, has_mask, device_limits)
        <= device_limits.shared_memory
        and resident * sums // threads + scores <= MAX_SUMS
        and not narrow
        and (itemsize == 2 or resident * moving <= FLOAT32_SCORES)
    )


def _fits_dkdv(tile, width, *asked):
    if tile.two_passes and width < 128:  # both sums have room, and a second pass makes the scores again
        return False
    return _fits(tile, tile.block_n, tile.block_m, (1 if tile.two_passes else 2) * width, width, *asked)


def _fits_dq(tile, width, *asked):
    return _fits(tile, tile.block_m, tile.block_n, width, width, *asked)


def _tunable(name, place, fits, **space):
    blocks = {"block_m": (16, 32, 64, 128), "block_n": (16, 32, 64, 128)}
    return Tunable(
        name,
        default=lambda queries, keys, *asked: default(*asked)[place],
        sizes=("queries", "keys"),
        flags=("width", "itemsize", "has_softcap", "mask_kind"),
        also=("dtype", "head_dim", "head_dim_v", "heads_per_key_head", "varlen", "left", "right", "alibi"),
        space={**blocks, "num_warps": (4, 8), "num_stages": (1, 2, 3), **space},
        fits=lambda tile, queries, keys, *asked: fits(tile, *asked),
        source=str(Path(__file__).with_name("__init__.py")),  # all files of the kernels
    )


DKDV = _tunable("attention_dkdv", 0, _fits_dkdv, two_passes=(False, True))
DQ = _tunable("attention_dq", 1, _fits_dq)


def config(op, device_limits, grad_out, grad_lse, q, k, v, out, lse, *rest):
    """(dk and dv's configuration, dq's) of one call."""
    is_varlen = op == "attention_varlen_backward"
    sizes = (rest[0].shape[0] - 1, *rest[2:4]) if is_varlen else (q.shape[0], q.shape[1], k.shape[1])
    _, alibi_slopes, mask, _, _, _, scale, *bounds = rest[4:] if is_varlen else rest
    _, constants = _options(sizes, alibi_slopes, mask, scale, *bounds)
    return _tiles(device_limits, q, k, v, sizes, is_varlen, constants)


def _tiles(device_limits, q, k, v, sizes, is_varlen, constants):
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    width = max(padded(head_dim), padded(value_dim))
    asked = *sizes[1:], width, q.element_size(), constants["HAS_SOFTCAP"], constants["MASK_KIND"]
    also = (
        q.dtype, head_dim, value_dim, q.shape[-2] // max(k.shape[-2], 1), is_varlen,
        *(constants[name] for name in ("HAS_LEFT", "HAS_RIGHT", "HAS_ALIBI")),
    )  # fmt: skip
    return DKDV.choose(device_limits, asked, also), DQ.choose(device_limits, asked, also)


def padded(head_dim):
    """The width of the tile that holds a head."""
    return max(16, power_of_2(head_dim))


def attention_backward(grad_out, grad_lse, q, k, v, out, lse, *options):
    """Gradients of q, k, v and sinks of `attention`."""
    sizes = q.shape[0], q.shape[1], k.shape[1]
    return _launch(grad_out, grad_lse, q, k, v, out, lse, None, None, sizes, *options)


def attention_varlen_backward(
    grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options
):
    """Gradients of q, k, v and sinks of `attention_varlen`; rows outside all sequences have none."""
    sizes = cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
    tensors = (None if t is None else t[None] for t in (grad_out, grad_lse, q, k, v, out, lse))
    dq, dk, dv, dsinks = _launch(*tensors, cu_seqlens_q, cu_seqlens_k, sizes, *options)
    return dq[0], dk[0], dv[0], dsinks


def _launch(
    grad_out, grad_lse, q, k, v, out, lse, cu_q, cu_k, sizes, sinks, alibi_slopes, mask, q_scale, k_scale, v_scale,
    softmax_scale, causal, window_left, window_right, softcap,
):  # fmt: skip
    """All three kernels on 4-dimensional tensors; with cu_q and cu_k the first dimension is 1."""
    grad_out, q, k, v, out = (dense(t) for t in (grad_out, q, k, v, out))
    is_varlen = cu_q is not None
    dq, dk, dv = (t.new_zeros(t.shape) if is_varlen else t.new_empty(t.shape) for t in (q, k, v))
    natural = mask is not None and mask.dtype != torch.bool
    row_lse, delta, dsinks = _prepare(grad_out, grad_lse, out, lse, sinks, cu_q, sizes, natural)
    options, constants = _options(sizes, alibi_slopes, mask, softmax_scale, causal, window_left, window_right, softcap)
    batch, num_queries, num_keys = sizes
    heads, kv_heads, head_dim, value_dim = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    block_d, block_dv = padded(head_dim), padded(value_dim)
    dkdv, dq_tile = _tiles(limits(q.device), q, k, v, sizes, is_varlen, constants)
    constants |= {"D": head_dim, "DV": value_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "IS_VARLEN": is_varlen}
    inputs = {
        **_layout(grad_out=grad_out, q=q, k=k, v=v, varlen=is_varlen),
        "lse_ptr": row_lse, "delta_ptr": delta, "stride_row_b": 0 if is_varlen else row_lse.stride(0),
        "stride_row_h": row_lse.stride(1), "cu_q_ptr": cu_q, "cu_k_ptr": cu_k,
        "group": heads // max(kv_heads, 1), "Sq": num_queries, "Sk": num_keys, **options, **constants,
    }  # fmt: skip
    programs = ceil_div(num_keys, dkdv.block_n) * kv_heads * batch
    for has in _passes(dkdv) if programs else ():
        _attention_dkdv_kernel[(programs,)](
            **inputs, **_layout(dk=dk, dv=dv, varlen=is_varlen), Hk=kv_heads, **has, **_tile(dkdv)
        )
    programs = ceil_div(num_queries, dq_tile.block_m) * heads * batch
    if programs:
        _attention_dq_kernel[(programs,)](**inputs, **_layout(dq=dq, varlen=is_varlen), H=heads, **_tile(dq_tile))
    return dq, dk, dv, dsinks


def _prepare(grad_out, grad_lse, out, lse, sinks, cu_q, sizes, natural):
    """What both kernels need of every row, and the gradient of the sinks."""
    batch, num_queries, _ = sizes
    heads, value_dim = out.shape[2], out.shape[3]
    row_lse, delta = (torch.empty(lse.shape, dtype=torch.float32, device=lse.device) for _ in "ld")
    block_dv = padded(value_dim)
    block_m = DELTA_ELEMENTS // block_dv
    blocks = ceil_div(num_queries, block_m)
    terms = None if sinks is None else delta.new_empty((batch, heads, blocks))
    is_varlen = cu_q is not None
    if batch * heads * blocks:
        strides = _layout(grad_out=grad_out, out=out, varlen=is_varlen)
        for name, rows in (("lse", lse), ("grad_lse", grad_lse)):
            b, h, s = (0, 0, 0) if rows is None else rows.stride()
            strides |= {f"stride_{name}_b": 0 if is_varlen else b, f"stride_{name}_h": h, f"stride_{name}_s": s}
        _attention_delta_kernel[(batch * heads * blocks,)](
            **strides, lse_ptr=lse, grad_lse_ptr=grad_lse, sinks_ptr=None if sinks is None else sinks.contiguous(),
            cu_q_ptr=cu_q, row_lse_ptr=row_lse, delta_ptr=delta, dsinks_ptr=terms,
            stride_row_b=0 if is_varlen else row_lse.stride(0), stride_row_h=row_lse.stride(1),
            H=heads, Sq=num_queries, DV=value_dim, HAS_GRAD_LSE=grad_lse is not None, HAS_SINKS=sinks is not None,
            NATURAL=natural, IS_VARLEN=is_varlen, BLOCK_M=block_m, BLOCK_DV=block_dv, num_warps=4,
        )  # fmt: skip
    return row_lse, delta, out.new_empty(0) if sinks is None else terms.sum((0, 2)).to(sinks.dtype)


def _options(sizes, alibi_slopes, mask, softmax_scale, causal, window_left, window_right, softcap):
    """Arguments and constants of the score transform. A window that reaches everything is none."""
    batch, num_queries, num_keys = sizes
    window_right = 0 if causal else window_right
    arguments = {
        "alibi_ptr": alibi_slopes, "mask_ptr": mask, "softmax_scale": softmax_scale, "softcap": softcap,
        "window_left": min(window_left, num_keys), "window_right": min(window_right, num_queries),
    }  # fmt: skip
    constants = {
        "HAS_LEFT": 0 <= window_left < num_keys, "HAS_RIGHT": 0 <= window_right < num_queries,
        "HAS_SOFTCAP": softcap != 0.0, "HAS_ALIBI": alibi_slopes is not None, "MASK_KIND": "none",
    }  # fmt: skip
    strides = (0, 0, 0, 0)
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        constants["MASK_KIND"] = "bool" if is_bool else "additive"
        arguments["mask_ptr"] = mask.view(torch.uint8) if is_bool else mask
        strides = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride())]
    arguments |= {f"stride_mask_{dim}": stride for dim, stride in zip("bhmn", strides)}
    slopes = (0, 0)
    if alibi_slopes is not None:
        slopes = (0 if alibi_slopes.dim() == 1 else alibi_slopes.stride(0), alibi_slopes.stride(-1))
    arguments |= {"stride_alibi_b": slopes[0], "stride_alibi_h": slopes[1]}
    return arguments, constants


def _layout(varlen, **tensors):
    """Pointer and strides of tensors [B, S, H, D] by the kernels' names; packed sequences have no batch stride."""
    found = {}
    for name, tensor in tensors.items():
        b, s, h, _ = tensor.stride()
        found[f"{name}_ptr"] = tensor
        found |= {f"stride_{name}_b": 0 if varlen else b, f"stride_{name}_s": s, f"stride_{name}_h": h}
    return found


def _passes(config):
    """What each launch of the dk and dv kernel computes."""
    if config.two_passes:
        return {"HAS_DK": False, "HAS_DV": True}, {"HAS_DK": True, "HAS_DV": False}
    return ({"HAS_DK": True, "HAS_DV": True},)


def _tile(config):
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def examples(dtype, target):
    """Causal attention of the usual head dims, whole and with every option at once, and the kernel before."""
    for head_dim in (64, 128, 256):
        yield from _examples(dtype, target, head_dim, {"HAS_RIGHT": True})
    if dtype == "bf16":
        every = dict.fromkeys(("HAS_LEFT", "HAS_RIGHT", "HAS_SOFTCAP", "HAS_ALIBI"), True)
        yield from _examples(dtype, target, 128, {})
        yield from _examples(dtype, target, 128, {**every, "MASK_KIND": "additive"})
        yield from _examples(dtype, target, 64, {**every, "IS_VARLEN": True})
    constants = {"DV": 128, "HAS_GRAD_LSE": True, "HAS_SINKS": True, "NATURAL": False, "IS_VARLEN": True,
                 "BLOCK_M": DELTA_ELEMENTS // 128, "BLOCK_DV": 128}  # fmt: skip
    wide = dict.fromkeys(("grad_out_ptr", "out_ptr", "sinks_ptr"), f"*{dtype}")
    types = _types(_attention_delta_kernel, constants, {**wide, "cu_q_ptr": "*i32"})
    yield KernelExample(_attention_delta_kernel, types, constants, _divisible(types), wide_access=False)


def _examples(dtype, target, head_dim, switches):
    """Every launch of dk, dv and dq with what the switches name; other options are left out."""
    flags = ("HAS_LEFT", "HAS_RIGHT", "HAS_SOFTCAP", "HAS_ALIBI", "IS_VARLEN")
    switches = {**dict.fromkeys(flags, False), "MASK_KIND": "none", **switches}
    has_mask, is_varlen = switches["MASK_KIND"] != "none", switches["IS_VARLEN"]
    itemsize = 4 if dtype == "fp32" else 2
    dkdv, dq = default(padded(head_dim), itemsize, switches["HAS_SOFTCAP"], switches["MASK_KIND"], target)
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("grad_out", "q", "k", "v", "dk", "dv", "dq")}
    optional = {
        "alibi_ptr": "*fp32" if switches["HAS_ALIBI"] else None, "mask_ptr": f"*{dtype}" if has_mask else None,
        "cu_q_ptr": "*i32" if is_varlen else None, "cu_k_ptr": "*i32" if is_varlen else None,
    }  # fmt: skip
    given = {**pointers, **{name: kind for name, kind in optional.items() if kind is not None}}
    absent = {name: None for name, kind in optional.items() if kind is None}
    sizes = {"D": head_dim, "DV": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_DV": padded(head_dim)}
    launches = [(_attention_dkdv_kernel, dkdv, has) for has in _passes(dkdv)] + [(_attention_dq_kernel, dq, {})]
    for kernel, config, has in launches:
        options = _tile(config)
        tile = {name: options.pop(name) for name in ("BLOCK_M", "BLOCK_N")}
        constants = {**absent, **switches, **sizes, **has, **tile}
        types = _types(kernel, constants, given)
        yield KernelExample(kernel, types, constants, _divisible(types), **options)


def _types(kernel, constants, pointers):
    """Types of the parameters that are not constants: known pointers, floats by name, float32 rows, integers."""
    known = {**pointers, "softmax_scale": "fp32", "softcap": "fp32"}
    names = [name for name in kernel.arg_names if name not in constants]
    return {name: known.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}


def _divisible(types):
    return tuple(name for name in types if name.endswith("_ptr") or name.startswith("stride_"))
