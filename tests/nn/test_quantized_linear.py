"""Int8Linear, Fp8Linear and WeightOnlyLinear: results, gradients, and input that does not fit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedops import counters, quantize_fp8, quantize_int8, reset_counters
from fusedops._core import env
from fusedops.nn import Int8Linear, quantized_linear, scaled_linear
from fusedops.testing import assert_accurate, make_tensor, strategies
from tests.nn.quantized_problems import (
    EVERY_FORMAT,
    FORMATS,
    FP8,
    ONE_OF_EACH,
    assert_same,
    budget_of,
    linear,
    plain_weight,
    quantized,
    truth_of,
)
from tests.ops.common import DTYPES, assert_compiles, assert_rejected, using

NAN, INF = float("nan"), float("inf")


# ---- accuracy


@given(
    name=st.sampled_from(sorted(FORMATS)), shape=strategies.row_shapes(max_n=300), N=st.integers(1, 150),
    dtype=strategies.dtypes(), bias=st.booleans(), data=st.data(),
)  # fmt: skip
def test_accuracy(name, shape, N, dtype, bias, data):
    """Any sizes: no multiples of 8 or 16, an odd K with two codes to a byte, no rows at all."""
    seed, layout = data.draw(strategies.seeds()), data.draw(strategies.layouts(len(shape)))
    layer = quantized(name, N, shape[-1], dtype, bias, seed)
    x = make_tensor(shape, dtype, seed=seed + 2, magnitude=data.draw(strategies.magnitudes()), layout=layout)
    with torch.no_grad():
        out = layer(x)
    truth = truth_of(layer, x)
    assert out.is_contiguous() and out.dtype == dtype
    assert_accurate(out, truth, budget=budget_of(layer, x, truth), zeros=False)  # what is rounded may cancel


@EVERY_FORMAT
def test_kernels(name):
    """By the kernels, through the ways that check: nothing of torch's composition is left behind."""
    layer, x = quantized(name, 40, 150), make_tensor((2, 150, 3), torch.float32, seed=5).transpose(1, 2)
    with using("triton"), torch.no_grad():
        out = layer(x)
    assert_accurate(out, truth_of(layer, x), zeros=False)


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(name, dtype):
    """Weights and inputs that are their own codes, since the largest of each group has the largest code."""
    cls, options = FORMATS[name]
    generator = torch.Generator().manual_seed(1)
    top = 15 if options.get("format") == "int4" else 448 if "fp8" in name else 127
    plain = linear(33, 131, dtype)
    whole = torch.randint(0 if top == 15 else -2, 3, (33, 131), generator=generator)
    whole[:, ::32] = top
    plain.weight.data.copy_(whole)
    plain.bias.data.copy_(torch.randint(-8, 9, (33,), generator=generator))
    x = torch.randint(-2, 3, (5, 131), generator=generator)
    x[:, ::128] = 448 if "fp8" in name else 127
    if "input_scale" in options:
        options = {**options, "input_scale": torch.ones(1)}
    layer = cls.from_linear(plain, **options)
    assert torch.equal(layer.dequantize(), plain.weight)
    if dtype == torch.float32:
        expected = (x.double() @ whole.T.double() + plain.bias.double()).float()
        with torch.no_grad():
            assert torch.equal(layer(x.to(dtype)), expected)


@EVERY_FORMAT
def test_every_shape_and_layout_of_the_input(name):
    """Leading dimensions, strides in each of them, one vector, no rows: the bits of contiguous rows."""
    layer, x = quantized(name, 37, 64), make_tensor((4, 6, 64), torch.float32, seed=3)
    inputs = [
        x[0], x[0, 0], x[:0], x[:, :0], x[1:, ::2], x.transpose(0, 1), x[:1].expand(3, 6, 64),
        x.transpose(1, 2).contiguous().transpose(1, 2), x[:, None].expand(4, 2, 6, 64),
    ]  # fmt: skip
    with torch.no_grad():
        for given_x in inputs:
            rows = given_x.contiguous().view(-1, 64)
            out = layer(given_x)
            assert torch.equal(out, layer(rows).view(*given_x.shape[:-1], 37)) and out.is_contiguous()


@EVERY_FORMAT
def test_zero_rows(name):
    """B35: pytorch/ao#4713: a row of zeros had a scale of 0. Here it gives the bias, exactly."""
    plain = linear(40, 130)
    plain.weight.data[3] = 0
    plain.weight.data[:, 128:] = 0
    x = make_tensor((4, 130), torch.float32, seed=1)
    x[2] = 0
    layer = FORMATS[name][0].from_linear(plain, **FORMATS[name][1])
    assert bool((layer.weight_scale > 0).all()) and bool(layer.weight_scale.isfinite().all())
    with torch.no_grad():
        out = layer(x)
    assert torch.equal(out[2], plain.bias) and torch.equal(out[:, 3], plain.bias[3].expand(4))


@EVERY_FORMAT
@pytest.mark.parametrize("bad", [INF, NAN])
def test_infinity_and_nan_stay_in_their_row(name, bad):
    layer, x = quantized(name, 20, 64), make_tensor((3, 64), torch.float32, seed=1)
    with torch.no_grad():
        clean = layer(x)
        x[1, 5] = bad
        out = layer(x)
    assert torch.equal(out[::2], clean[::2])
    assert "static" in name or not bool(out[1].isfinite().any())


@EVERY_FORMAT
@pytest.mark.parametrize("bad", [INF, NAN])
def test_infinity_and_nan_of_a_weight_stay_in_its_column(name, bad):
    plain, x = linear(20, 64), make_tensor((3, 64), torch.float32, seed=1)
    with torch.no_grad():
        clean = FORMATS[name][0].from_linear(plain, **FORMATS[name][1])(x)
        plain.weight[4, 5] = bad
        out = FORMATS[name][0].from_linear(plain, **FORMATS[name][1])(x)
    assert not bool(out[:, 4].isfinite().any())
    if "block" not in name:  # where rows of a weight share a scale
        kept = [n for n in range(20) if n != 4]
        assert torch.equal(out[:, kept], clean[:, kept])


@pytest.mark.parametrize("name", [name for name in FORMATS if "int4" not in name])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_lie_within_half_a_step(name, dtype):
    """Also where the scale is rounded to 16 bits: it is rounded before the codes are computed, and up."""
    plain = linear(50, 200, dtype)
    plain.weight.data[:10] *= 2.0**-14  # denormal scales in float16
    layer = FORMATS[name][0].from_linear(plain, **FORMATS[name][1])
    error = (plain_weight(layer) - plain.weight.detach().double()).abs()
    weight, step = plain.weight.detach().double().abs(), layer.weight_scale.double()
    if layer.weight.dtype == FP8:
        assert bool((error <= weight / 16 + step.max() * 2.0**-10).all())
        return
    columns = step.shape[1] if step.dim() == 2 else 1
    size = layer.options.get("group_size") or 200
    step = step.view(50, columns).repeat_interleave(size, 1)[:, :200]
    assert bool((error <= step * (0.5 + 2.0**-16)).all())  # places of up to 127 steps are float32
    if layer.weight.dtype == torch.int8:
        assert bool((step * 127 >= weight * (1 - 2.0**-22)).all()) and int(layer.weight.min()) >= -127


@EVERY_FORMAT
def test_dequantize_and_back(name):
    layer = quantized(name, 30, 70, torch.bfloat16)
    weight = layer.dequantize()
    assert weight.dtype == torch.bfloat16 and torch.equal(layer.dequantize(torch.float32).bfloat16(), weight)
    torch.testing.assert_close(layer.dequantize(torch.float32).double(), plain_weight(layer), rtol=2**-23, atol=0)
    plain = layer.eval().to_linear()
    assert type(plain) is torch.nn.Linear and not plain.training and plain.weight.requires_grad
    assert torch.equal(plain.weight, weight) and torch.equal(plain.bias, layer.bias)
    assert plain.bias.data_ptr() != layer.bias.data_ptr()
    assert layer.to_linear(torch.float32).bias.dtype == torch.float32


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8 block", "int8 static"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(5,), (2, 3), (), (0,)], ids=str)
def test_quantised_input(name, dtype, leading):
    """What `forward` does in two parts, and a residual."""
    layer, x = quantized(name, 40, 150, dtype), make_tensor((*leading, 150), dtype, seed=4)
    quantize = quantize_int8 if layer.weight.dtype == torch.int8 else quantize_fp8
    granularity = "tensor" if layer.options["static_input"] else layer.options.get("granularity", "row")
    residual = make_tensor((*leading, 40), dtype, seed=6)
    with torch.no_grad():
        values, scale = quantize(x, granularity=granularity, scale=layer.input_scale if "static" in name else None)
        assert torch.equal(layer.forward_quantized(values, scale, dtype), layer(x))
        out = layer.forward_quantized(values, scale, dtype, residual)
    assert_accurate(out, truth_of(layer, x) + residual.double(), zeros=False)


def test_no_copy_of_the_weight_and_no_checks_twice(monkeypatch):
    layer, seen = quantized("int8", 8, 16, bias=False), []
    monkeypatch.setattr(scaled_linear, "direct", lambda operator, x: None)
    monkeypatch.setattr(Int8Linear, "matmul", staticmethod(lambda a, b, *rest, **options: seen.append(b) or a.float()))
    layer(torch.ones(2, 16))
    assert seen[0].data_ptr() == layer.weight.data_ptr() and seen[0].shape == (8, 16)


@EVERY_FORMAT
def test_the_short_way_gives_what_the_checked_one_gives(name):
    """At level 2 every scale is looked at; the short way of a CPU leaves that out."""
    layer, x = quantized(name, 40, 96), make_tensor((3, 96), torch.float32, seed=2)
    reset_counters()
    with torch.no_grad():
        short = layer(x)
        counted = counters()
        reset_counters()
        with env.override("FUSEDOPS_VALIDATE", "2"):
            assert torch.equal(layer(x), short)
            assert counters() == counted and set(counted.values()) == {1}
            layer.weight_scale.view(-1)[0] = NAN
            with pytest.raises(ValueError, match="must be finite and above 0, got nan"):
                layer(x)


# ---- gradients


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_gradients(name, dtype):
    """Of what trains beside a quantised layer, such as LoRA: x times the dequantised weight, and the bias."""
    layer, x = quantized(name, 24, 40, dtype), make_tensor((2, 3, 40), dtype, seed=1).requires_grad_()
    grad = make_tensor((2, 3, 24), dtype, seed=2)
    out = layer(x)
    out.backward(grad)
    with torch.no_grad():
        assert torch.equal(out, layer(x)), "a gradient changes no bit"
    wide = grad.double().view(-1, 24)
    weight = layer.dequantize().double()
    assert_accurate(x.grad.view(-1, 40), wide @ weight, name="grad_x")
    assert_accurate(layer.bias.grad, wide.sum(0), name="grad_bias")
    assert all(p.grad is None for key, p in layer.named_parameters() if key != "bias")


@ONE_OF_EACH
def test_only_what_is_wanted_is_differentiated(name, monkeypatch):
    layer, x = quantized(name, 24, 40), make_tensor((3, 40), torch.float32, seed=1)
    assert layer(x).requires_grad and layer(x).grad_fn is not None, "the bias is trained"
    layer.bias.requires_grad_(False)
    assert not layer(x).requires_grad
    leaf = x.clone().requires_grad_()
    assert layer(leaf).requires_grad
    for off in (torch.no_grad, torch.inference_mode):
        with off(), monkeypatch.context() as patch:
            patch.delattr(quantized_linear, "differentiable")  # nothing of it is even called
            assert not layer(leaf).requires_grad and layer(leaf).grad_fn is None
    layer.bias = None
    (found,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    torch.testing.assert_close(found, layer.dequantize().sum(0).expand(3, 40))
    once = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


@ONE_OF_EACH
def test_an_adapter_trains_beside(name):
    """LoRA before a quantised layer, by an optimizer that is given every parameter."""
    torch.manual_seed(0)
    base = [quantized(name, 32, 32, seed=seed).requires_grad_(False) for seed in (1, 2)]
    adapter = torch.nn.Sequential(torch.nn.Linear(32, 8, bias=False), torch.nn.Linear(8, 32, bias=False))
    model = torch.nn.ModuleList([*base, adapter])
    before = copy.deepcopy(base[1].state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, wanted = (make_tensor((64, 32), torch.float32, seed=seed) for seed in (3, 4))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (base[1](base[0](x) + adapter(x)) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses
    assert_same(base[1].state_dict(), before)


def test_a_quantised_input_has_no_gradient():
    layer = quantized("int8", 24, 40)
    out = layer.forward_quantized(*quantize_int8(make_tensor((3, 40), torch.float32, seed=1)), torch.float32)
    with pytest.raises(NotImplementedError, match="int8_matmul: the result must not be differentiated"):
        out.sum().backward()


@pytest.mark.parametrize("name, with_gradient", [("int8", True), ("fp8 block", False), ("weight int4", True)])
def test_compile(name, with_gradient):
    layer = quantized(name, 24, 40)
    inputs = [(make_tensor((rows, 40), torch.float32, seed=rows),) for rows in (3, 5)]
    if not with_gradient:
        with torch.no_grad():
            return assert_compiles(layer, *inputs)
    leaf = inputs[0][0].clone().requires_grad_()
    assert_compiles(layer, (leaf,))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(leaf).sum(), (leaf, layer.bias))
    torch.testing.assert_close(found[0], layer.dequantize().sum(0).expand(3, 40))
    torch.testing.assert_close(found[1], torch.full((24,), 3.0))


# ---- rejects

X = torch.ones(3, 40)
CODES = torch.ones(3, 40, dtype=torch.int8)
REJECTED = [
    ("int8", lambda m: m(torch.ones(3, 41)), ValueError, r"shape \[..., K\] with K=40, got \[3, 41\]"),
    ("weight int4", lambda m: m(torch.ones(20)), ValueError, r"WeightOnlyLinear: x must have shape \[..., K\] wi"),
    ("fp8", lambda m: m(torch.ones(())), ValueError, r"Fp8Linear: x must have .* with K=40, got \[\]"),
    ("fp8", lambda m: m([1.0]), TypeError, "Fp8Linear: x must be a torch.Tensor, got list"),
    ("fp8", lambda m: m(X.to("meta")), ValueError, "Fp8Linear: x must be on cpu, got meta"),
    ("int8", lambda m: m(X.double()), TypeError, "x must be float16, bfloat16 or float32, got float64"),
    ("weight int8", lambda m: m(X.int()), TypeError, "x must be float16, bfloat16 or float32, got int32"),
    ("int8", lambda m: m.forward_quantized(X, torch.ones(3), torch.float32), TypeError, "a must be int8, got float32"),
    ("int8", lambda m: m.forward_quantized(CODES[:, 1:], torch.ones(3), torch.float32), ValueError, "b must have"),
    ("int8", lambda m: m.forward_quantized(CODES, torch.ones(2), torch.float32), ValueError, "scale_a must"),
    ("int8", lambda m: m.forward_quantized(CODES, torch.ones(3), torch.int8), TypeError, "out_dtype must be float16"),
    ("int8", lambda m: m.forward_quantized(CODES, torch.ones(3), torch.float32, X), ValueError, "residual must have"),
]


@pytest.mark.parametrize("name, call, error, message", REJECTED)
def test_wrong_input(name, call, error, message):
    layer = quantized(name, 24, 40)
    for with_gradient in (False, True):
        reset_counters()
        with torch.set_grad_enabled(with_gradient):
            assert_rejected(lambda: call(layer), error, message)


@pytest.mark.parametrize("strict", [False, True])
@ONE_OF_EACH
def test_torch_export(name, strict):
    """A program of fusedops' operators, with no decision about values in it, and the layer's very result."""
    layer, x = quantized(name, 24, 32), make_tensor((5, 32), torch.float32, seed=4)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=strict)
        assert any(str(node.target).startswith("fusedops.") for node in program.graph.nodes)
        assert torch.equal(program.module()(x), layer(x))
        assert torch.equal(program.module()(2 * x), layer(2 * x))
