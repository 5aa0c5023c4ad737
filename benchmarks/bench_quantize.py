"""quantize_int8 and quantize_fp8 against torch's composition, eager and compiled, and vLLM's kernels."""

import functools

import torch
from _common import Case, compiled, main, peer

from fusedops import quantize_fp8, quantize_int8

VLLM_INT8 = peer("vllm._custom_ops", "scaled_int8_quant")
VLLM_FP8 = peer("vllm._custom_ops", "scaled_fp8_quant")

# (rows, K), the decisive ones first: activations of a batch, one token and a short prompt; the last is a weight
SHAPES = {
    "cpu": [(1, 4096), (64, 4096), (64, 576), (1536, 576)],
    "cuda": [(8192, 4096), (1, 4096), (8192, 14336), (64, 4096), (16384, 8192), (14336, 4096)],
}


def plain(x, largest, dtype, dims=(-1,)):
    """The formula: one scale for what lies along the dimensions."""
    scale = x.float().abs().amax(dims, keepdim=True) / largest
    values = x * (1 / scale)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def plain_int8(x):
    values, scale = plain(x, 127.0, torch.int8)
    return values, scale.squeeze(-1)


def plain_fp8(x):
    values, scale = plain(x, 448.0, torch.float8_e4m3fn)
    return values, scale.squeeze(-1)


def plain_tensor(x):
    values, scale = plain(x, 448.0, torch.float8_e4m3fn, (0, 1))
    return values, scale.view(())


def plain_block(x):
    values, scale = plain(x.unflatten(-1, (-1, 128)), 448.0, torch.float8_e4m3fn)
    return values.flatten(-2), scale.squeeze(-1)


def plain_block_2d(x):
    squares = x.unflatten(-1, (-1, 128)).unflatten(0, (-1, 128))
    values, scale = plain(squares, 448.0, torch.float8_e4m3fn, (1, 3))
    return values.reshape(x.shape), scale[:, 0, :, 0]


def vllm_int8(x):
    values, scale, _ = VLLM_INT8(x)
    return values, scale.squeeze(-1)


def vllm_fp8(x):
    values, scale = VLLM_FP8(x, use_per_token_if_dynamic=True)
    return values, scale.squeeze(-1)


def vllm_tensor(x):
    values, scale = VLLM_FP8(x)
    return values, scale.view(())


KINDS = (  # name, ours, options, torch's composition, vLLM's where it can be imported
    ("quantize_int8", quantize_int8, {}, plain_int8, VLLM_INT8 and vllm_int8),
    ("quantize_fp8", quantize_fp8, {}, plain_fp8, VLLM_FP8 and vllm_fp8),
    ("quantize_fp8", quantize_fp8, {"granularity": "tensor"}, plain_tensor, VLLM_FP8 and vllm_tensor),
    ("quantize_fp8", quantize_fp8, {"granularity": "block"}, plain_block, None),
    ("quantize_fp8", quantize_fp8, {"granularity": "block_2d"}, plain_block_2d, None),
)


def cases(device, quick):
    """Every granularity on every shape that it is for."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for rows, k in SHAPES[device][:2] if quick else SHAPES[device]:

        def make(seed, rows=rows, k=k):
            return (torch.randn(rows, k, device=device, dtype=dtype),)

        for name, ours, options, formula, vllm in KINDS:
            granularity = options.get("granularity", "row")
            if (granularity != "row" and k % 128) or (granularity == "block_2d" and rows % 128):
                continue
            candidates = {
                "fusedops": functools.partial(ours, **options), "torch": formula, "torch.compile": compiled(formula)
            }  # fmt: skip
            if device == "cuda" and vllm:
                candidates["vllm"] = vllm
            shape = f"{rows}x{k}" if granularity == "row" else f"{rows}x{k} {granularity}"
            yield Case(name, shape, dtype, make, candidates, options)


if __name__ == "__main__":
    main(cases)
