"""The operator calls of a model, from its config.json alone: random values, the shapes of prompt and decoding."""

import json
from dataclasses import dataclass
from pathlib import Path

from fusedops.cli.console import CommandError

PAGE_SIZE = 16
SCHEMES = ("none", "int8", "fp8", "int8-weight-only", "int4-weight-only", "2:4")


@dataclass(frozen=True)
class Shapes:
    """The sizes of a decoder's layers."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str

    @property
    def linears(self):
        """(outputs, inputs) of a layer's linears, none twice."""
        width = self.heads * self.head_dim
        found = ((width, self.hidden), (self.kv_heads * self.head_dim, self.hidden), (self.hidden, width),
                 (self.intermediate, self.hidden), (self.hidden, self.intermediate))  # fmt: skip
        return tuple(dict.fromkeys(found))


def read_shapes(path):
    """The shapes of a config.json, or of the directory that holds one. CommandError: it cannot be used."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CommandError(f"--model must be a config.json or a directory that holds one, got {path}") from error
    if isinstance(data, dict) and isinstance(data.get("text_config"), dict):
        data = data["text_config"]
    if not isinstance(data, dict):
        raise CommandError(f"{path} must hold a table")
    heads = _size(data, "num_attention_heads", path)
    hidden = _size(data, "hidden_size", path)
    return Shapes(
        hidden,
        _size(data, "intermediate_size", path),
        heads,
        _size(data, "num_key_value_heads", path, heads),
        _size(data, "head_dim", path, hidden // heads),
        str(data.get("hidden_act", data.get("hidden_activation", "silu"))),
    )


def _size(data, name, path, default=None):
    value = data.get(name)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise CommandError(f"{path}: {name} must be a positive number, got {value!r}")
    return value


def calls(shapes, dtype, device, *, batches, prompt, scheme="none"):
    """(what it is, operator, args, kwargs) of each call: `prompt` tokens at once, and steps of each batch.

    Norms come once, their configuration does not depend on the number of rows.
    """
    import torch

    def randn(*size):
        return torch.randn(size, device=device).to(dtype)

    yield from differentiated(shapes, dtype, device, prompt=prompt)
    for batch in batches:
        yield f"{batch} x {prompt} tokens", "paged_attention", _paged(shapes, randn, device, batch, prompt), {}
    if scheme != "none":
        for columns, depth in shapes.linears:
            for rows in (*batches, prompt):
                op, args, kwargs = _product(scheme, randn(rows, depth), randn(columns, depth), dtype)
                yield f"{rows} x {columns} x {depth}", op, args, kwargs


def differentiated(shapes, dtype, device, *, prompt):
    """Those calls of a prompt that training differentiates."""
    import torch

    def randn(*size):
        return torch.randn(size, device=device).to(dtype)

    x, weight = randn(prompt, shapes.hidden), randn(shapes.hidden)
    yield f"{shapes.hidden} wide", "rms_norm", (x, weight), {}
    yield f"{shapes.hidden} wide", "add_rms_norm", (x, randn(prompt, shapes.hidden), weight), {}
    q = randn(1, prompt, shapes.heads, shapes.head_dim)
    k, v = (randn(1, prompt, shapes.kv_heads, shapes.head_dim) for _ in "kv")
    yield f"{prompt} tokens", "rotary", (q, k, *(randn(1, prompt, shapes.head_dim) for _ in ("cos", "sin"))), {}
    yield f"{prompt} tokens", "attention", (q, k, v), {"causal": True}
    gate = "gelu_mul" if "gelu" in shapes.activation else "silu_mul"
    options = {"approximate": "tanh"} if "tanh" in shapes.activation else {}
    yield f"{shapes.intermediate} wide", gate, tuple(randn(prompt, shapes.intermediate) for _ in "ab"), options


def _paged(shapes, randn, device, batch, length):
    import torch

    pages = -(-length // PAGE_SIZE)
    caches = [randn(batch * pages, PAGE_SIZE, shapes.kv_heads, shapes.head_dim) for _ in "kv"]
    table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    return randn(batch, shapes.heads, shapes.head_dim), *caches, table, lengths


def _product(scheme, x, weight, dtype):
    """The product of a quantised linear."""
    import fusedops

    if scheme in ("int8", "fp8"):
        quantize = fusedops.quantize_int8 if scheme == "int8" else fusedops.quantize_fp8
        (a, scale_a), (b, scale_b) = quantize(x), quantize(weight)
        return f"{scheme}_matmul", (a, b, scale_a, scale_b), {"out_dtype": dtype}
    if scheme == "2:4":
        return "sparse_matmul", (x, *fusedops.compress_24(fusedops.prune_24(weight))), {}
    if scheme == "int8-weight-only":
        return "weight_only_matmul", (x, *fusedops.quantize_int8(weight)), {}
    values, scale, zero = fusedops.quantize_int4(weight, group_size=32)
    return "weight_only_matmul", (x, values, scale.to(dtype)), {"zero": zero}
