"""Quantised linear layers of every format, and what they stand for, spelled out."""

import pytest
import torch

from fusedops.nn import Fp8Linear, Int8Linear, WeightOnlyLinear
from fusedops.ops.quantize import reference
from fusedops.testing import make_tensor
from tests.ops.common import counted_budget

FP8 = torch.float8_e4m3fn
FORMATS = {
    "int8": (Int8Linear, {}),
    "int8 static": (Int8Linear, {"input_scale": 0.03}),
    "fp8": (Fp8Linear, {}),
    "fp8 block": (Fp8Linear, {"granularity": "block"}),
    "fp8 block static": (Fp8Linear, {"granularity": "block", "input_scale": 0.01}),
    "weight int8": (WeightOnlyLinear, {"format": "int8"}),
    "weight int8 groups": (WeightOnlyLinear, {"format": "int8", "group_size": 64}),
    "weight fp8": (WeightOnlyLinear, {"format": "fp8"}),
    "weight fp8 groups": (WeightOnlyLinear, {"format": "fp8", "group_size": 32}),
    "weight int4": (WeightOnlyLinear, {"format": "int4"}),
    "weight int4 groups": (WeightOnlyLinear, {"format": "int4", "group_size": 128}),
}
EVERY_FORMAT = pytest.mark.parametrize("name", FORMATS)
ONE_OF_EACH = pytest.mark.parametrize("name", ["int8", "fp8 block", "weight int8", "weight int4"])


def linear(N, K, dtype=torch.float32, bias=True, seed=0):
    """A plain layer with seeded weights of about 1 / sqrt(K)."""
    made = torch.nn.Linear(K, N, bias, dtype=dtype)
    made.weight.data.copy_(make_tensor((N, K), torch.float32, seed=seed) * K**-0.5)
    if bias:
        made.bias.data.copy_(make_tensor((N,), torch.float32, seed=seed + 1))
    return made


def quantized(name, N, K, dtype=torch.float32, bias=True, seed=0):
    """A quantised layer of a format, from `linear`."""
    cls, options = FORMATS[name]
    return cls.from_linear(linear(N, K, dtype, bias, seed), **options)


def plain_weight(layer):
    """The weight that codes and scales stand for, in float64, one scale looked up for each element."""
    N, K = layer.out_features, layer.in_features
    values, scale = layer.weight[0], layer.weight_scale.double()
    if values.dtype == torch.uint8:
        values = torch.stack((values & 15, values >> 4), dim=2).view(N, -1)[:, :K]
    rows, columns = torch.arange(N)[:, None], torch.arange(K)[None]
    if scale.dim() == 1:
        at = (rows.expand(N, K),)
    elif layer.options.get("granularity") == "block":
        at = rows // 128, columns // 128
    else:
        at = rows, columns // layer.options["group_size"]
    values = values.double()
    if "weight_zero" in layer._parameters:
        values = values - layer.weight_zero.double()[at] / 16
    return values * scale[at]


def plain_input(layer, x):
    """The input that the layer multiplies, in float64."""
    if "weight_zero" in layer._parameters or "format" in layer.options:
        return x.double()
    dtype = layer.weight.dtype
    if layer.options["static_input"]:
        return reference.quantize_scaled(x, layer.input_scale, "tensor", dtype).double() * layer.input_scale.double()
    granularity = "block" if layer.options.get("granularity") == "block" else "row"
    values, scale = reference.quantize_fp8(x, granularity, dtype)
    scale = scale.double()
    if granularity == "block":
        return values.double() * scale.repeat_interleave(128, -1)[..., : x.shape[-1]]
    return values.double() * scale[..., None]


def truth_of(layer, x):
    """What the layer should give, in float64."""
    out = plain_input(layer, x) @ plain_weight(layer).T
    return out if layer.bias is None else out + layer.bias.detach().double()


def assert_same(ours, theirs):
    """Two state dicts hold the same bits."""
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and tensor.shape == theirs[key].shape, key
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, theirs[key])]
        assert torch.equal(*raw), key


def budget_of(layer, x, truth):
    """On a CPU in bfloat16 torch's own product with int8 weights rounds once more, before the bias."""
    packed = x.dtype == torch.bfloat16 and layer.options.get("format") == "int8"
    if not packed or not truth.any():
        return None
    product = truth if layer.bias is None else truth - layer.bias.detach().double()
    return counted_budget(x.dtype, product.abs() * torch.finfo(x.dtype).eps, truth)
