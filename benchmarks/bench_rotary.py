"""rotary against the formula of Hugging Face's models, eager and compiled, Liger and FlashInfer."""

import torch
from _common import Case, compiled, main, peer
from _layouts import Layouts

from fusedops import rotary

LIGER = peer("liger_kernel.transformers.functional", "liger_rope")
FLASHINFER = peer("flashinfer.rope", "apply_rope_with_cos_sin_cache")

# (B, S, H, Hk, D) of SmolLM2-135M, Llama 3 8B and 70B
SHAPES = {
    "cpu": [(1, 1, 9, 3, 64), (1, 64, 9, 3, 64), (1, 128, 32, 8, 128)],
    "cuda": [(1, 4096, 32, 8, 128), (1, 1, 32, 8, 128), (4, 4096, 64, 8, 128)],
}


def rotate_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def formula(q, k, cos, sin):
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def liger(q, k, cos, sin):
    """In place, on tensors whose heads are outside."""
    turned = LIGER(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return tuple(heads.transpose(1, 2) for heads in turned)


def flashinfer(q, layout):
    """On tokens in one row, with k, the places in a table, and the table of cosines and sines in float32."""
    k, places, table = layout
    rows = (heads.flatten(0, 1).flatten(1) for heads in (q, k))
    turned = FLASHINFER(places, *rows, q.shape[-1], table, is_neox=True)
    return turned[0].view_as(q), turned[1].view_as(k)


def for_flashinfer(k, cos, sin):
    half = cos.shape[-1] // 2
    places = torch.arange(k.shape[1], device=k.device).repeat(k.shape[0])
    return k, places, torch.cat((cos[0, :, :half], sin[0, :, :half]), -1).float().contiguous()


def cases(device, quick):
    """q and k as a model's attention has them: heads outside, positions inside."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for batch, length, heads, kv_heads, dim in SHAPES[device][:2] if quick else SHAPES[device]:

        layouts = Layouts()

        def make(seed, batch=batch, length=length, heads=heads, kv_heads=kv_heads, dim=dim, layouts=layouts):
            q, k = (torch.randn(batch, length, h, dim, device=device, dtype=dtype) for h in (heads, kv_heads))
            angle = torch.rand(1, length, dim // 2, device=device).repeat(1, 1, 2)
            arguments = q, k, angle.cos().to(dtype), angle.sin().to(dtype)
            layouts.add(seed, *arguments[1:])
            return arguments

        candidates = {"fusedops": rotary, "torch": formula, "torch.compile": compiled(formula)}
        if device == "cuda" and LIGER:
            candidates["liger"] = liger
        if device == "cuda" and FLASHINFER:
            candidates["flashinfer"] = layouts.taking(flashinfer, for_flashinfer)
        yield Case("rotary", f"{batch}x{length}x{heads}/{kv_heads}x{dim}", dtype, make, candidates, {})


if __name__ == "__main__":
    main(cases)
