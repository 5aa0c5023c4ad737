"""Keys and values of new tokens into the pages of a cache, and the same with the rotation before."""

import torch

from fusedops._core import checks, env
from fusedops._core.register import register
from fusedops.ops.attention import check_table
from fusedops.ops.rotary import MAX_D

MAX_PAGE = 256  # tokens of a page
STEP_PAGE = 8  # but for pages of one token
CODES = (torch.int8, torch.float8_e4m3fn)


def write_kv_cache(k, v, k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None):
    """Write the keys and values of new tokens to their slots in the pages of a cache.

    ``k_cache[slot // page_size, slot % page_size] = k[t]`` with ``slot = slot_mapping[t]``, and v likewise; into an
    int8 or float8 cache ``round(k[t] / k_scale)``, cut to the range.

    Args:
        k: ``[T, Hk, D]``, float16, bfloat16 or float32; the last dimension is contiguous, all other strides are free.
        v: ``[T, Hk, Dv]``, k's dtype.
        k_cache: ``[num_pages, page_size, Hk, D]``, k's dtype, int8 or float8_e4m3fn; page_size is 1 or a multiple of 8
            up to 256. Changed. Strides as k's: k_cache and v_cache may be views of one buffer.
        v_cache: ``[num_pages, page_size, Hk, Dv]``, k_cache's dtype. Changed.
        slot_mapping: ``[T]``, int64: where each token goes; -1 skips it. Any other slot that does not exist is skipped
            too, unless level 2 refuses it. Of tokens with the same slot any one is the last writer of its elements.
        k_scale, v_scale: float32, for int8 and float8 alone: they multiply the stored values to give the real ones. One
            number (``[]`` or ``[1]``), or one for each head ``[Hk]``: read. ``[num_pages, page_size, Hk]``: one for
            each token and head, computed from its largest value and written beside it. None is 1.

    Raises:
        ValueError: a shape, stride or device does not fit, or tensors share memory; with FUSEDOPS_VALIDATE=2 also slots
            out of range, and scales that are not above 0.
        TypeError: a dtype is not one of the above.
        NotImplementedError: a page size is none of the above, or D or Dv is more than MAX_D.
        RuntimeError: gradients are recorded for a tensor.

    Numerics: a cache of k's dtype gets the very bits. Codes are made in float32 and rounded to nearest even; beyond the
        range the largest code stands. A computed scale is ``max(abs(row)) / 127`` (float8: 448) and at least 2**-126,
        so that a row of zeros has codes of 0 and a finite scale; of a row with NaN it is NaN. With a scale that is
        given, NaN is NaN in float8 and 0 in int8.
    Runs on: CUDA 8.0 and newer (Triton), float8 8.9 and newer; elsewhere torch.
    From: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023,
        https://arxiv.org/abs/2309.06180
    """
    _check("write_kv_cache", k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    _write_kv_cache(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def rotary_write_kv_cache(
    q, k, v, cos, sin, k_cache, v_cache, slot_mapping, *, interleaved=False, k_scale=None, v_scale=None
):
    """Rotate queries and keys by their tokens' angles, and write keys and values to their slots, in one pass.

    ``q, k = rotary(q, k, cos, sin)``;  ``write_kv_cache(k, v, k_cache, v_cache, slot_mapping)``;  ``return q``

    Args:
        q: ``[T, H, D]``, float16, bfloat16 or float32; the last dimension is contiguous, all other strides are free.
        k: ``[T, Hk, D]``, q's dtype. Not changed: rotated it is in the cache alone.
        v: ``[T, Hk, Dv]``, q's dtype.
        cos, sin: ``[T, R]`` with R even and R <= D, q's dtype or float32: a row for each token. The elements of a head
            beyond R pass.
        k_cache, v_cache, slot_mapping: As in `write_kv_cache`. Tokens that are skipped have their q rotated too.
        interleaved: Pairs are neighbours (GPT-J, GLM) instead of the two halves (Llama, GPT-NeoX).
        k_scale, v_scale: As in `write_kv_cache`.

    Returns:
        The rotated q: a new tensor of q's shape and dtype, and its strides where those are dense.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `write_kv_cache` and `rotary`.

    Numerics: rotation in float32, rounded once to q's dtype; codes are made of the rounded keys.
    Runs on: CUDA 8.0 and newer (Triton), float8 8.9 and newer; elsewhere torch.
    From: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
        https://arxiv.org/abs/2104.09864
    """
    op = "rotary_write_kv_cache"
    sizes = _check(op, k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, q=q, cos=cos, sin=sin)
    if sizes["R"] % 2 or not 0 < sizes["R"] <= sizes["D"]:
        raise ValueError(f"{op}: cos must have an even last size from 2 to D={sizes['D']}, got {sizes['R']}")
    if not isinstance(interleaved, bool):
        raise TypeError(f"{op}: interleaved must be a bool, got {type(interleaved).__name__}")
    return _rotary_write_kv_cache(q, k, v, cos, sin, k_cache, v_cache, slot_mapping, interleaved, k_scale, v_scale)


def _check(op, k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, q=None, cos=None, sin=None):
    """Check all arguments but the size of the rotation."""
    specs = {} if cos is None else {"q": (q, "T H D")}
    specs |= {"k": (k, "T Hk D"), "v": (v, "T Hk Dv")}
    specs |= {} if cos is None else {"cos": (cos, "T R"), "sin": (sin, "T R")}
    sizes = checks.bind_shapes(
        op, **specs, k_cache=(k_cache, "num_pages page_size Hk D"), v_cache=(v_cache, "num_pages page_size Hk Dv"),
        slot_mapping=(slot_mapping, "T"),
    )  # fmt: skip
    given = {"k": k, "v": v} if cos is None else {"q": q, "k": k, "v": v}
    checks.check_float(op, **given)
    checks.check_rows(op, **given, cos=cos, sin=sin)
    checks.check_parameter(op, k, cos=cos, sin=sin)
    check_cache(op, k, k_cache, v_cache, sizes)
    for name in ("D", "Dv"):
        if sizes[name] > MAX_D:
            raise NotImplementedError(f"{op}: {name} must be at most MAX_D = {MAX_D}, got {sizes[name]}")
    if slot_mapping.dtype != torch.int64:
        raise TypeError(f"{op}: slot_mapping must be int64, got {_dtype(slot_mapping)}")
    check_scales(op, k_cache, sizes, k_scale=k_scale, v_scale=v_scale)
    changed = {"k_cache": k_cache, "v_cache": v_cache}
    changed |= {name: s for name, s in (("k_scale", k_scale), ("v_scale", v_scale)) if s is not None and s.dim() == 3}
    checks.check_no_grad(op, **given, **changed, cos=cos, sin=sin)
    checks.check_writable(op, **changed)
    if env.validate() and not torch.compiler.is_compiling():
        _check_memory(op, given, changed)
    if env.validate() == 2 and not torch.compiler.is_compiling() and not k.is_meta:
        _check_device_values(op, slot_mapping, sizes["num_pages"] * sizes["page_size"], k_scale, v_scale)
    return sizes


def check_cache(op, x, k_cache, v_cache, sizes):
    """Check dtypes, strides and page size of a cache beside data x; the shapes are bound in sizes."""
    if k_cache.dtype not in (x.dtype, *CODES):
        raise TypeError(f"{op}: k_cache must be {_dtype(x)}, int8 or float8_e4m3fn, got {_dtype(k_cache)}")
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"{op}: v_cache must be {_dtype(k_cache)}, got {_dtype(v_cache)}")
    checks.check_rows(op, k_cache=k_cache, v_cache=v_cache)
    page_size = sizes["page_size"]
    if page_size != 1 and (page_size % STEP_PAGE or not 0 < page_size <= MAX_PAGE):
        raise NotImplementedError(
            f"{op}: page_size must be 1 or a multiple of {STEP_PAGE} up to MAX_PAGE = {MAX_PAGE}, got {page_size}"
        )


def check_scales(op, k_cache, sizes, **scales):
    """Check the scales of a cache of codes."""
    heads, pages = sizes["Hk"], (sizes["num_pages"], sizes["page_size"], sizes["Hk"])
    for name, scale in scales.items():
        if scale is None:
            continue
        if k_cache.dtype not in CODES:
            raise ValueError(f"{op}: {name} must be None unless the cache is int8 or float8, got {_dtype(k_cache)}")
        described = "[], [1], [Hk] or [num_pages, page_size, Hk]"
        check_table(op, name, scale, k_cache, [(), (1,), (heads,), pages], described, (torch.float32,))


def _check_memory(op, given, changed):
    """Nothing that is read may lie where something is written; k_cache and v_cache may share a buffer, not a place."""
    for name, tensor in changed.items():
        for other, source in given.items():
            if checks.overlaps(tensor, source):
                raise ValueError(f"{op}: {name} must not share memory with {other}, got overlapping tensors")
    k_cache, v_cache = changed["k_cache"], changed["v_cache"]
    if k_cache.numel() and not k_cache.is_meta and k_cache.data_ptr() == v_cache.data_ptr():
        raise ValueError(f"{op}: v_cache must not be the memory of k_cache, got one address for both")


def _check_device_values(op, slot_mapping, num_slots, k_scale, v_scale):
    """What only a look into device memory tells; it waits for the device."""
    bad = (slot_mapping < -1) | (slot_mapping >= num_slots)
    if bool(bad.any()):
        raise ValueError(
            f"{op}: slot_mapping must hold -1 or slots from 0 to {num_slots - 1}, got {slot_mapping[bad][0].item()}"
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and scale.dim() < 3 and not bool((scale.isfinite() & (scale > 0)).all()):
            raise ValueError(f"{op}: {name} must be finite and above 0, got {scale.tolist()}")


def _dtype(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _cost(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale):
    elements = k.numel() + v.numel()
    moved = elements * (k.element_size() + k_cache.element_size()) + 8 * slot_mapping.numel()
    per_token = sum(scale is not None and scale.dim() == 3 for scale in (k_scale, v_scale))
    return moved + 4 * per_token * k.shape[0] * k.shape[1], elements


def _cost_rotary(q, k, v, cos, sin, k_cache, v_cache, slot_mapping, interleaved, k_scale, v_scale):
    moved, operations = _cost(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    moved += 2 * q.numel() * q.element_size() + (cos.numel() + sin.numel()) * cos.element_size()
    return moved, operations + 3 * (q.numel() + k.numel()) * cos.shape[1] // max(q.shape[2], 1)


def _example(shape, dtype, device):
    """shape is [B, S, H, D]: B * S tokens go to slots in reverse order."""
    *leading, heads, dim = shape
    total = 1
    for size in leading:
        total *= size
    k, v = (torch.randn(total, heads, dim, device=device).to(dtype) for _ in "kv")
    caches = [torch.zeros(-(-total // 16), 16, heads, dim, dtype=dtype, device=device) for _ in "kv"]
    return (k, v, *caches, torch.arange(total, device=device).flip(0)), {}


def _example_rotary(shape, dtype, device):
    """The same, with as many heads of queries."""
    (k, v, *rest), options = _example(shape, dtype, device)
    angle = torch.rand(k.shape[0], k.shape[2], device=device)
    return (torch.randn_like(k), k, v, angle.cos().to(dtype), angle.sin().to(dtype), *rest), options


_CACHES = "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping"
_SCALES = "Tensor(c!)? k_scale, Tensor(d!)? v_scale"
_write_kv_cache = register(
    f"write_kv_cache(Tensor k, Tensor v, {_CACHES}, {_SCALES}) -> ()",
    package=__name__,
    implementations=("triton", "torch", "reference"),
    fake=lambda *args: None,
    cost=_cost,
    example=_example,
)
_rotary_write_kv_cache = register(
    "rotary_write_kv_cache(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, "
    f"{_CACHES}, bool interleaved, {_SCALES}) -> Tensor",
    package=__name__,
    implementations=("triton", "torch", "reference"),
    fake=lambda q, *rest: torch.empty_like(q),
    cost=_cost_rotary,
    example=_example_rotary,
)
