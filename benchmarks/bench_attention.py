"""attention, packed attention and the merge of two against torch's own ways, FlashAttention 2 to 4 and FlashInfer."""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from _common import Case, compiled, difference, error_of, main, peer
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedops import attention, attention_varlen, merge_attention
from fusedops.nn import functional
from fusedops.ops.attention import reference

FA2 = peer("flash_attn", "flash_attn_func")
FA3 = peer("fa3_fwd_interface", "flash_attn_func") or peer("flash_attn_interface", "flash_attn_func")
FA3_VARLEN = peer("fa3_fwd_interface", "flash_attn_varlen_func") or peer(
    "flash_attn_interface", "flash_attn_varlen_func"
)
FA4 = peer("flash_attn.cute", "flash_attn_func")
FA4_VARLEN = peer("flash_attn.cute", "flash_attn_varlen_func")
FLASHINFER_PREFILL = peer("flashinfer", "single_prefill_with_kv_cache")
FLASHINFER_DECODE = peer("flashinfer", "single_decode_with_kv_cache")

TOKENS = 2**14  # of a batch: B is TOKENS / S
HEADS = {64: (32, 8), 128: (32, 8), 256: (16, 4)}  # (H, Hk) by D
LENGTHS = (4096, 8192, 16384, 2048)  # the decisive ones first
DECODE = ((1, 8192), (16, 8192), (1, 32768), (16, 32768))  # (B, Sk)
PACKED = {"cpu": (5, 64, 1, 30), "cuda": (1, 129, 500, 1000, 1500, 2047, 3111, 8096)}  # lengths of sequences in a batch
SLOW_LENGTHS = (2048,)  # of ways that nobody chooses, and of which one holds all scores
FLEX_LENGTHS = (8192,)  # each shape takes torch.compile tens of seconds
CHECKED_QUERIES = 64
BACKWARD_OPERATIONS = 3.5  # of both passes, by those of the forward pass: 7 products instead of 2
FP8_TOLERANCE = 0.1  # a peer may round the weights to float8 before they meet the values


def heads_first(function):
    """A function of [B, H, S, D] made one of [B, S, H, D]."""

    @functools.wraps(function)
    def call(q, k, v):
        return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return call


def sdpa(causal):
    """torch's own choice."""
    return heads_first(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    )


def sdpa_cudnn(causal, with_backward):
    """cuDNN's kernel, called without SDPA's choice among backends, which would cost the host time."""
    call = torch.ops.aten._scaled_dot_product_cudnn_attention
    return heads_first(lambda q, k, v: call(q, k, v, None, with_backward, 0.0, causal)[0])


def sdpa_flash(causal):
    """torch's FlashAttention 2, called likewise."""
    call = torch.ops.aten._scaled_dot_product_flash_attention
    return heads_first(lambda q, k, v: call(q, k, v, 0.0, causal)[0])


def sdpa_forced(backend, causal):
    """torch's SDPA on one backend, of those that want as many heads of keys as of queries: these are copied."""

    def call(q, k, v):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return heads_first(call)


def flex(causal, num_queries, num_keys, device="cuda"):
    """FlexAttention, compiled for this shape, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # brings all of torch.compile

    def keep(b, h, query, key):
        return query + num_keys - num_queries >= key

    block_mask = create_block_mask(keep, None, None, num_queries, num_keys, device=device) if causal else None
    call = compiled(flex_attention)
    return heads_first(lambda q, k, v: call(q, k, v, block_mask=block_mask, enable_gqa=True))


def flashinfer(causal, num_queries):
    """FlashInfer's calls for a single sequence."""
    if num_queries == 1 and FLASHINFER_DECODE:
        return lambda q, k, v: FLASHINFER_DECODE(q[0, 0], k[0], v[0])[None, None]
    return lambda q, k, v: FLASHINFER_PREFILL(q[0], k[0], v[0], causal=causal)[None]


def gpu_peers(shape, causal, with_backward=False):
    """Name to function of (q, k, v), of those that are installed and know such a call. `shape` is (B, Sq, Sk)."""
    batch, num_queries, num_keys = shape
    found = {"cudnn": sdpa_cudnn(causal, with_backward), "torch flash": sdpa_flash(causal)}
    if num_queries == num_keys and num_keys in SLOW_LENGTHS:
        found["torch efficient"] = sdpa_forced(SDPBackend.EFFICIENT_ATTENTION, causal)
        found["torch math"] = sdpa_forced(SDPBackend.MATH, causal)
    if num_keys in FLEX_LENGTHS and (causal or num_queries == 1):
        found["flex"] = flex(causal, num_queries, num_keys)
    if FA2:
        found["flash-attn 2"] = functools.partial(FA2, causal=causal)
    if FA3 and not with_backward:
        splits = 0 if num_queries == 1 else 1  # 0: it chooses
        found["fa3"] = lambda q, k, v: FA3(q, k, v, causal=causal, num_splits=splits)
    if FA4:
        found["flash-attn 4"] = lambda q, k, v: FA4(q, k, v, causal=causal)[0]
    if FLASHINFER_PREFILL and batch == 1 and not with_backward:
        found["flashinfer"] = flashinfer(causal, num_queries)
    return found


def error_of_last_queries(case, arguments, out):
    """How far the last queries of the first sequence are from float64."""
    q, k, v = (t[:1].double() for t in arguments)
    args = [None] * 6 + [q.shape[-1] ** -0.5, case.options["causal"], -1, -1, 0.0]
    wanted, _ = reference.attention(q[:, -CHECKED_QUERIES:], k, v, *args)
    return difference(out[:1, -CHECKED_QUERIES:], wanted)


def error_of_last_sequence(case, arguments, out):
    """How far the last queries of the last packed sequence are from float64."""
    first = int(arguments[3][-2])
    return error_of_last_queries(case, [t[None, first:] for t in arguments[:3]], out[None, first:])


def with_gradients(function, grad):
    """Forward and backward pass of a function of (q, k, v)."""

    def call(q, k, v):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            return torch.autograd.grad(function(*leaves), leaves, grad)

    return call


def case(shape, heads, dim, dtype, causal, device, peers, **more):
    """A case of (B, Sq, Sk) and (H, Hk)."""
    (batch, num_queries, num_keys), (num_heads, kv_heads) = shape, heads

    def make(seed):
        lengths = ((num_queries, num_heads), (num_keys, kv_heads), (num_keys, kv_heads))
        return tuple(torch.randn(batch, *size, dim, device=device).to(dtype) for size in lengths)

    length = f"{num_queries}" if num_queries == num_keys else f"{num_queries}:{num_keys}"
    name = f"{batch}x{length}x{num_heads}/{kv_heads}x{dim}{' causal' if causal else ''}"
    options = {"causal": causal}
    candidates = {"fusedops": functools.partial(attention, **options), **peers}
    return Case("attention", name, dtype, make, candidates, options, check=error_of_last_queries, **more)


def backward_case(length, dim, dtype, device, plain):
    """Forward and backward pass together, causal."""
    shape, heads = (TOKENS // length, length, length), HEADS[dim]
    grad = torch.randn(shape[0], length, heads[0], dim, device=device).to(dtype)
    both = case(shape, heads, dim, dtype, True, device, plain(shape, True, True))
    operations = 4 * shape[0] * heads[0] * length**2 / 2 * dim * BACKWARD_OPERATIONS
    tensors = 4 * heads[0] + 4 * heads[1]  # heads of q, out and their gradients, of k, v and theirs
    moved = shape[0] * length * tensors * dim * dtype.itemsize
    candidates = {name: with_gradients(call, grad) for name, call in both.candidates.items()}
    name = f"{both.shape} +backward"
    return replace(both, shape=name, candidates=candidates, cost=(moved, operations), check=None)


def prefill(causal, lengths, device):
    """bfloat16, TOKENS tokens in sequences of each length."""
    for length in lengths:
        for dim in (128, 64, 256):
            shape = (TOKENS // length, length, length)
            goal = (0.97, 0.80 if causal and length >= 8192 else None)
            yield case(shape, HEADS[dim], dim, torch.bfloat16, causal, device, gpu_peers(shape, causal), goal=goal)


def prefill_fp8(lengths, device):
    """The same in float8, causal."""
    for length in lengths:
        shape, peers = (TOKENS // length, length, length), {"fa3": functools.partial(FA3, causal=True)} if FA3 else {}
        yield case(shape, HEADS[128], 128, torch.float8_e4m3fn, True, device, peers, tolerance=FP8_TOLERANCE)


def fa4_varlen(q, k, v, starts_q, starts_k, max_q, max_k):
    return FA4_VARLEN(q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, causal=True)[0]


def packed_case(device, dtype):
    """Sequences of very different lengths, one after another, causal."""
    lengths, dim = PACKED[device], 128
    (heads, kv_heads), total = HEADS[dim], sum(PACKED[device])
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()

    def make(seed):
        q, k, v = (torch.randn(total, count, dim, device=device).to(dtype) for count in (heads, kv_heads, kv_heads))
        return q, k, v, starts, starts, max(lengths), max(lengths)

    def torch_flash(q, k, v, starts_q, starts_k, max_q, max_k):
        call = torch.ops.aten._flash_attention_forward
        return call(q, k, v, starts_q, starts_k, max_q, max_k, 0.0, True, False)[0]

    def one_by_one(q, k, v, starts_q, starts_k, max_q, max_k):
        parts = zip(*(tensor[None].split(lengths, 1) for tensor in (q, k, v)), strict=True)
        return torch.cat([sdpa(True)(*part)[0] for part in parts])

    candidates = {"fusedops": functools.partial(attention_varlen, causal=True)}
    if device == "cpu":
        candidates["torch, one by one"] = one_by_one
    else:
        candidates["torch flash"] = torch_flash
        if FA3_VARLEN:
            candidates["fa3"] = functools.partial(FA3_VARLEN, causal=True)
        if FA4_VARLEN:
            candidates["flash-attn 4"] = fa4_varlen
    operations = sum(2 * heads * length * (length + 1) * dim for length in lengths)
    moved = total * dim * dtype.itemsize * 2 * (heads + kv_heads)
    name = f"{len(lengths)} of {min(lengths)} to {max(lengths)}, {heads}/{kv_heads}x{dim} causal"
    options, check = {"causal": True}, error_of_last_sequence
    return Case("attention_varlen", name, dtype, make, candidates, options, cost=(moved, operations), check=check)


def torch_merge(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((part - lse).exp().mT[..., None] for part in (lse_a, lse_b))
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse


def merge_case(device, dtype):
    """Two results for the same queries."""
    shape = (1, 64, 9, 64) if device == "cpu" else (4, 4096, 32, 128)
    batch, length, heads, _ = shape

    def make(seed):
        outs = [torch.randn(shape, device=device).to(dtype) for _ in "ab"]
        lses = [torch.randn(batch, heads, length, device=device) for _ in "ab"]
        return outs[0], lses[0], outs[1], lses[1]

    candidates = {"fusedops": merge_attention, "torch": torch_merge, "torch.compile": compiled(torch_merge)}
    return Case("merge_attention", "x".join(map(str, shape)), dtype, make, candidates, {})


def beside_torch(shape, heads, dim, dtype, *, causal=False, mask=None, surface=False, backward=False):
    """On a CPU, beside torch's function; `surface`: by ``fusedops.nn.functional``, from memory in torch's order."""
    batch, num_queries, num_keys = shape
    own, options, gqa = functools.partial(attention, causal=causal), {"causal": causal}, heads[0] != heads[1]
    if mask is not None:
        own, options = functools.partial(own, mask=mask), options | {"mask": mask}
    keywords = {"attn_mask": mask, "is_causal": causal, "enable_gqa": gqa}
    candidates = {"fusedops": own, "torch": heads_first(functools.partial(F.scaled_dot_product_attention, **keywords))}
    if surface:
        candidates["fusedops"] = heads_first(functools.partial(functional.scaled_dot_product_attention, **keywords))
    cost = None
    if backward:
        tensors = num_queries * heads[0] + num_keys * heads[1]  # q and out, k and v, and the gradients of each pair
        operations = 4 * batch * heads[0] * num_queries * num_keys * dim * BACKWARD_OPERATIONS / (1 + causal)
        cost = 4 * batch * tensors * dim * dtype.itemsize, operations
        grad = torch.randn(batch, num_queries, heads[0], dim).to(dtype)
        candidates = {name: with_gradients(call, grad) for name, call in candidates.items()}
    plain = case(shape, heads, dim, dtype, causal, "cpu", {})
    make = plain.make
    if surface:

        def make(seed):
            return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in plain.make(seed))

    kind = "" if mask is None else " bool mask" if mask.dtype == torch.bool else " additive mask"
    name = f"{plain.shape}{kind}{' nn.functional' * surface}{' +backward' * backward}"
    check = None if backward else error_of if mask is not None else error_of_last_queries
    return replace(
        plain, shape=name, make=make, candidates=candidates, options=options, cost=cost, goal=(0.95, None), check=check
    )


def grid(dtype):
    """What torch covers on a CPU: head sizes, decoding, batches, masks, gradients, tiny calls, our surface."""
    one = functools.partial(beside_torch, dtype=dtype)
    for heads, dim in (((9, 3), 64), ((8, 8), 80), ((8, 2), 128), ((4, 2), 256)):
        yield one((1, 512, 512), heads, dim, causal=True)
        yield one((1, 512, 512), heads, dim)
    yield one((1, 2048, 2048), (9, 3), 64, causal=True)
    for heads in ((9, 3), (12, 12)):
        for num_keys in (128, 1024, 8192):
            yield one((1, 1, num_keys), heads, 64)
        for batch in (4, 16):
            yield one((batch, 1, 1024), heads, 64)
        padding = torch.arange(1024) >= torch.arange(4)[:, None] * 100
        yield one((4, 1, 1024), heads, 64, mask=padding[:, None, None])
    yield one((1, 1, 1024), (32, 8), 128)
    for length in (64, 512):
        seen = torch.rand(2, 1, length, length) < 0.8
        yield one((2, length, length), (8, 2), 64, mask=seen)
        yield one((2, length, length), (8, 8), 64, mask=torch.where(seen, 0.0, -1.0).to(dtype))
        yield one((1, length, length), (8, 8), 64, causal=True, backward=True)
        yield one((2, length, length), (8, 8), 64, mask=seen, backward=True)
    yield one((1, 16, 16), (4, 4), 64, causal=True)
    for causal, mask in ((True, None), (False, seen[:1])):
        yield one((1, 512, 512), (9, 3), 64, causal=causal, mask=mask, surface=True)
    for heads in ((9, 3), (12, 12)):
        yield one((1, 1, 1024), heads, 64, surface=True)


def cases(device, quick):
    """Prefill of TOKENS tokens, decode of one token, forward and backward pass, and float8."""
    if device == "cpu":
        for shape, causal in (((1, 64, 64), True), ((1, 1, 256), False), ((2, 256, 256), True)):
            yield case(shape, (9, 3), 64, torch.float32, causal, device, {"torch": sdpa(causal)})
        yield packed_case(device, torch.float32)
        yield merge_case(device, torch.float32)
        if not quick:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                yield from grid(dtype)
        return
    yield from prefill(True, LENGTHS[:1] if quick else LENGTHS, device)
    for batch, num_keys in DECODE[:1] if quick else DECODE:
        shape = (batch, 1, num_keys)
        yield case(shape, HEADS[128], 128, torch.bfloat16, False, device, gpu_peers(shape, False))
    yield backward_case(4096, 128, torch.bfloat16, device, gpu_peers)
    if supports_fp8():
        yield from prefill_fp8(LENGTHS[:1] if quick else LENGTHS, device)
    yield packed_case(device, torch.bfloat16)
    yield merge_case(device, torch.bfloat16)
    if not quick:
        yield from prefill(False, LENGTHS, device)


def supports_fp8():
    return torch.cuda.get_device_capability() >= (8, 9)


if __name__ == "__main__":
    main(cases)
