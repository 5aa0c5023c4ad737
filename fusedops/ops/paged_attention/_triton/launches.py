"""Launches without tensors, from which the compile tests make machine code."""

from fusedops._core.launch import KernelExample
from fusedops.ops.paged_attention._triton.combine import _combine_kernel
from fusedops.ops.paged_attention._triton.forward import _paged_attention_kernel

CODES = {"i8": 0, "fp8e4nv": 89}  # types of quantised caches, and the least compute capability for them
BLOCK_B = 32
_SWITCHES = {
    "SPLITS": "auto", "IS_VARLEN": False, "HAS_LEFT": False, "HAS_RIGHT": False, "HAS_SOFTCAP": False,
    "HAS_ALIBI": False, "HAS_SINKS": False, "HAS_TREE": False, "K_SCALE": "none", "V_SCALE": "none", "PAGE_SIZE": 16,
}  # fmt: skip


def examples(default, dtype, target):
    """Decoding for the usual head dims and every kind of cache, chunks, drafts in a tree, and joining; by `default`."""
    chunk = {"IS_VARLEN": True, "HAS_RIGHT": True}
    gptoss = {"IS_VARLEN": True, "HAS_LEFT": True, "HAS_SINKS": True}
    yield _attention(default, dtype, target, 128, 4, {})
    yield _attention(default, dtype, target, 128, 4096, chunk)
    for code, capability in CODES.items():
        if target.capability >= capability and dtype != "fp32":
            yield _attention(default, dtype, target, 128, 4, {"K_SCALE": "token", "V_SCALE": "token"}, code)
    if dtype == "bf16":
        yield _attention(default, dtype, target, 64, 8, gptoss)
        yield _attention(default, dtype, target, 64, 4096, {**chunk, **gptoss, "SPLITS": "none"})
        yield _attention(default, dtype, target, 256, 2, {"HAS_SOFTCAP": True, "PAGE_SIZE": 1})
        yield _attention(default, dtype, target, 512, 16, {"SPLITS": "fixed", "PAGE_SIZE": 64})
        yield _attention(default, dtype, target, 128, 64, {**chunk, "HAS_TREE": True, "SPLITS": "fixed"})
        yield _attention(default, dtype, target, 80, 16, {"HAS_ALIBI": True, "PAGE_SIZE": 24})
        yield _attention(default, dtype, target, 128, 4096, {**chunk, "K_SCALE": "head", "V_SCALE": "head"}, "i8")
    yield _combination(dtype)


def _attention(default, dtype, target, head_dim, num_rows, switches, code=None):
    """A launch with what the switches name, every other option left out."""
    itemsize = 4 if dtype == "fp32" else 2
    switches = {**_SWITCHES, **switches}
    tile = default(
        num_rows,
        head_dim,
        head_dim,
        itemsize,
        1 if code else itemsize,
        switches["HAS_LEFT"],
        switches["HAS_TREE"],
        target,
    )
    plain = not (switches["HAS_SOFTCAP"] or switches["HAS_ALIBI"] or code)
    constants = {
        **switches, "PLAIN": plain, "D": head_dim, "DV": head_dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d, "BLOCK_DV": tile.block_dv, "BLOCK_B": BLOCK_B,
    }  # fmt: skip
    pointers = {
        "q_ptr": dtype, "k_ptr": code or dtype, "v_ptr": code or dtype, "table_ptr": "i32", "seqlens_ptr": "i32",
        "cu_q_ptr": "i32" if switches["IS_VARLEN"] else None, "sinks_ptr": dtype if switches["HAS_SINKS"] else None,
        "alibi_ptr": "fp32" if switches["HAS_ALIBI"] else None, "k_scale_ptr": "fp32" if code else None,
        "v_scale_ptr": "fp32" if code else None, "tree_ptr": "i32" if switches["HAS_TREE"] else None,
        "out_ptr": dtype, "lse_ptr": "fp32", "parts_ptr": "fp32", "states_ptr": "fp32",
    }  # fmt: skip
    types, divisible = {}, []
    for name in _paged_attention_kernel.arg_names:
        if name in constants:
            continue
        if name.endswith("_ptr") and pointers[name] is None:
            constants[name] = None
            continue
        scalar = "fp32" if name in ("softmax_scale", "softcap") else "i32"
        types[name] = f"*{pointers[name]}" if name in pointers else scalar
        divisible += [name] if name.endswith("_ptr") or name.startswith(("stride_q", "stride_k_", "stride_v_")) else []
    return KernelExample(_paged_attention_kernel, types, constants, tuple(divisible), tile.num_warps, tile.num_stages)


def _combination(dtype):
    pointers = {"seqlens_ptr": "*i32", "sinks_ptr": "*fp32", "parts_ptr": "*fp32", "states_ptr": "*fp32",
                "out_ptr": f"*{dtype}", "lse_ptr": "*fp32"}  # fmt: skip
    constants = {
        "cu_q_ptr": None, "SPLITS": "auto", "IS_VARLEN": False, "HAS_LEFT": False, "HAS_SINKS": True, "DV": 128,
        "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_B": BLOCK_B, "BLOCK_DV": 128, "BLOCK_SPLITS": 16,
    }  # fmt: skip
    types = {n: pointers.get(n, "i32") for n in _combine_kernel.arg_names if n not in constants}
    return KernelExample(
        _combine_kernel, types, constants, tuple(pointers), num_warps=4,
        wide_access=False,  # its loads are; a row of the result is a few bytes a thread
    )  # fmt: skip
