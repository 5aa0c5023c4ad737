"""rms_norm, add_rms_norm, in place and with codes too: torch, torch.compile, Liger, QuACK, FlashInfer and vLLM."""

import functools

import torch
import torch.nn.functional as F
from _common import Case, compiled, main, peer

from fusedops import add_rms_norm, add_rms_norm_, add_rms_norm_quantized, rms_norm, rms_norm_quantized

EPS = 1e-6
LIGER = peer("liger_kernel.transformers.functional", "liger_rms_norm")
LIGER_ADD = peer("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")
QUACK = peer("quack", "rmsnorm")
FLASHINFER_PLAIN = peer("flashinfer.norm", "rmsnorm")
FLASHINFER_IN_PLACE = peer("flashinfer.norm", "fused_add_rmsnorm")
FLASHINFER = peer("flashinfer.norm", "rmsnorm_quant")
FLASHINFER_ADD = peer("flashinfer.norm", "fused_add_rmsnorm_quant")
VLLM = peer("vllm._custom_ops", "rms_norm_dynamic_per_token_quant")
FP8 = torch.float8_e4m3fn

# (rows, N), the decisive ones first: a batch, one token and a short prompt of models from 576 to 16,384 wide
SHAPES = {
    "cpu": [(1, 576), (64, 576), (1, 4096), (256, 4096)],
    "cuda": [(8192, 4096), (1, 4096), (8192, 16384), (8192, 2048), (16384, 8192), (64, 4096)],
}


def torch_rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def torch_add_rms_norm(x, residual, weight):
    h = x + residual
    return F.rms_norm(h, weight.shape, weight, EPS), h


def torch_add_rms_norm_(x, residual, weight):
    """In place, as far as torch's own operators have it."""
    return x.copy_(F.rms_norm(residual.add_(x), weight.shape, weight, EPS)), residual


def in_place(function):
    """A function of (x, residual, weight) that overwrites the first two."""

    def call(x, residual, weight):
        function(x, residual, weight, EPS)
        return x, residual

    return call


def torch_quantized(out):
    scale = out.float().abs().amax(-1, keepdim=True) / 127
    return (out * (1 / scale)).round().to(torch.int8), scale.squeeze(-1)


def torch_rms_norm_quantized(x, weight):
    return torch_quantized(torch_rms_norm(x, weight))


def torch_add_rms_norm_quantized(x, residual, weight):
    out, h = torch_add_rms_norm(x, residual, weight)
    return *torch_quantized(out), h


def quantized_cases(shape, dtype, makes, goal):
    """Both operators with int8 output."""
    for name, ours, plain, make in (
        ("rms_norm_quantized", rms_norm_quantized, torch_rms_norm_quantized, makes[0]),
        ("add_rms_norm_quantized", add_rms_norm_quantized, torch_add_rms_norm_quantized, makes[1]),
    ):
        candidates = {"fusedops": ours, "torch": plain, "torch.compile": compiled(plain)}
        yield Case(name, shape, dtype, make, candidates, {}, goal=goal)


def alike(rows, n, count, device, dtype):
    """Tensors whose rows hold the same numbers, each row with its own turn and signs, which are alike in all tensors:
    the rows of their sum, normalised with weights of 1, have one scale."""
    places = torch.arange(n, device=device) + torch.randint(n, (rows, 1), device=device)
    signs = torch.randint(2, (rows, 1), device=device) * 2 - 1
    return tuple((torch.randn(n, device=device)[places % n] * signs).to(dtype) for _ in range(count))


def fp8_cases(rows, n, device, dtype, goal):
    """Both operators with float8 output, on rows that share a scale: FlashInfer takes one that is known before."""
    for function, count in ((rms_norm_quantized, 1), (add_rms_norm_quantized, 2)):
        yield fp8_case(function, count, rows, n, device, dtype, goal)


def fp8_case(function, count, rows, n, device, dtype, goal):
    """One of them. The scale that is known is that of the latest arguments."""
    ones, known = torch.ones(n, device=device, dtype=dtype), torch.empty(1, device=device)

    def make(seed):
        made = alike(rows, n, count, device, dtype)
        known.copy_(function(*made, ones, dtype=FP8)[1][:1])
        return made

    def torch_fp8(x, residual=None):
        h = x if residual is None else x + residual
        out = F.rms_norm(h, ones.shape, ones, EPS).float()
        scale = out.abs().amax(-1, keepdim=True) / 448
        codes = (out * (1 / scale)).to(FP8), scale.squeeze(-1)
        return codes if residual is None else (*codes, h)

    def flashinfer(x, residual=None):
        out = torch.empty_like(x, dtype=FP8)
        if residual is None:
            FLASHINFER(out, x, ones, known, EPS)
            return out, known.expand(rows)
        FLASHINFER_ADD(out, x, residual, ones, known, EPS)
        return out, known.expand(rows), residual

    def vllm(x, residual=None):
        out, scale = VLLM(x, ones, EPS, FP8, None, residual)
        return (out, scale.squeeze(-1)) if residual is None else (out, scale.squeeze(-1), residual)

    options = {"weight": ones, "dtype": FP8}
    candidates = {
        "fusedops": functools.partial(function, **options), "torch": torch_fp8, "torch.compile": compiled(torch_fp8)
    }  # fmt: skip
    if device == "cuda" and (FLASHINFER if count == 1 else FLASHINFER_ADD):
        candidates["flashinfer"] = flashinfer
    if device == "cuda" and VLLM:
        candidates["vllm"] = vllm
    shape = f"{rows}x{n} float8"
    return Case(function.__name__, shape, dtype, make, candidates, options, goal=goal, against=("flashinfer",))


def cases(device, quick):
    """Every operator on every shape."""
    for rows, n in SHAPES[device][:2] if quick else SHAPES[device]:
        for dtype in (torch.float32,) if device == "cpu" else (torch.bfloat16,):

            def make(seed, rows=rows, n=n, dtype=dtype):
                return torch.randn(rows, n, device=device, dtype=dtype), torch.randn(n, device=device, dtype=dtype)

            def make_residual(seed, make=make):
                x, weight = make(seed)
                return x, torch.randn_like(x), weight

            candidates = {"fusedops": rms_norm, "torch": torch_rms_norm, "torch.compile": compiled(torch_rms_norm)}
            fused = {
                "fusedops": add_rms_norm,
                "torch": torch_add_rms_norm,
                "torch.compile": compiled(torch_add_rms_norm),
            }
            if device == "cuda" and LIGER:
                candidates["liger"] = lambda x, weight: LIGER(x, weight, EPS)
            if device == "cuda" and FLASHINFER_PLAIN:
                candidates["flashinfer"] = lambda x, weight: FLASHINFER_PLAIN(x, weight, EPS)
            if device == "cuda" and QUACK:
                candidates["quack"] = lambda x, weight: QUACK(x, weight, eps=EPS)
                fused["quack"] = lambda x, residual, weight: QUACK(x, weight, residual=residual, eps=EPS, prenorm=True)
            goal = (1.0, 0.97) if rows >= 8192 else (None, None)
            yield Case("rms_norm", f"{rows}x{n}", dtype, make, candidates, {}, goal=goal)
            yield Case("add_rms_norm", f"{rows}x{n}", dtype, make_residual, fused, {}, goal=goal)
            both = {"fusedops": in_place(add_rms_norm_), "torch": torch_add_rms_norm_}
            if device == "cuda" and FLASHINFER_IN_PLACE:
                both["flashinfer"] = in_place(FLASHINFER_IN_PLACE)
            yield Case("add_rms_norm_", f"{rows}x{n}", dtype, make_residual, both, {}, check=None)
            goal = (1.0, 0.88) if rows >= 8192 else (None, None)
            yield from quantized_cases(f"{rows}x{n}", dtype, (make, make_residual), goal)
            if quick and (rows, n) != SHAPES[device][0]:
                continue
            goal = (1.2, 0.88) if rows >= 8192 else (None, None)
            yield from fp8_cases(rows, n, device, dtype, goal)


if __name__ == "__main__":
    main(cases)
