"""Sparse24Linear: results, what is stored, state dicts, dtypes, the dense copy, and input that does not fit."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedops import counters, is_24, prune_24, reset_counters
from fusedops._core import env
from fusedops.nn import Sparse24Linear
from fusedops.ops.quantize import reference
from fusedops.testing import assert_accurate, make_tensor, strategies
from tests.nn.quantized_problems import assert_same, linear
from tests.ops.common import DTYPES, assert_compiles, assert_rejected, using

FP8 = torch.float8_e4m3fn
FORMATS = {None: None, "int8": torch.int8, "fp8": FP8}
EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS)


def sparse(format, N, K, dtype=torch.float32, bias=True, seed=0, **options):
    return Sparse24Linear.from_linear(linear(N, K, dtype, bias, seed), prune=True, format=format, **options)


def plain_weight(layer):
    """The weight that is stored, in float64, one place of a group looked up after the other."""
    N, K = layer.out_features, layer.in_features
    values = layer.weight[0].double() * (layer.weight_scale.double()[:, None] if layer.options["format"] else 1)
    dense = torch.zeros(N, values.shape[1] * 2, dtype=torch.float64)
    for group in range(values.shape[1] // 2):
        bits = layer.metadata[:, group // 2].long() >> 4 * (group % 2)
        for which in (0, 1):
            place = bits >> 2 * which & 3
            dense[torch.arange(N), 4 * group + place] = values[:, 2 * group + which]
    assert not dense[:, K:].any(), "nothing is stored beyond K"
    return dense[:, :K]


def truth_of(layer, x):
    """What the layer should give, in float64."""
    wide = x.double()
    if layer.options["format"] is not None:
        quantize = reference.quantize_fp8 if layer.options["format"] == "fp8" else reference.quantize_int8
        arguments = (x, "row", FP8) if layer.options["format"] == "fp8" else (x, "row")
        values, scale = quantize(*arguments)
        wide = values.double() * scale.double()[..., None]
    out = wide @ plain_weight(layer).T
    return out if layer.bias is None else out + layer.bias.detach().double()


# ---- results


@given(
    format=st.sampled_from(list(FORMATS)), shape=strategies.row_shapes(max_n=300), N=st.integers(1, 150),
    dtype=strategies.dtypes(), bias=st.booleans(), dense_below=st.sampled_from([None, 2, 10**6]), data=st.data(),
)  # fmt: skip
def test_accuracy(format, shape, N, dtype, bias, dense_below, data):
    """Any sizes: no whole groups of 4, one column, no rows at all; of the weight or of its dense copy."""
    seed, layout = data.draw(strategies.seeds()), data.draw(strategies.layouts(len(shape)))
    layer = sparse(format, N, shape[-1], dtype, bias, seed, dense_below=dense_below)
    x = make_tensor(shape, dtype, seed=seed + 2, magnitude=data.draw(strategies.magnitudes()), layout=layout)
    with torch.no_grad():
        out = layer(x)
    assert out.is_contiguous() and out.dtype == dtype
    assert_accurate(out, truth_of(layer, x), zeros=False)


@EVERY_FORMAT
def test_kernels(format):
    """By the kernels, through the ways that check: nothing of torch's composition is left behind."""
    layer, x = sparse(format, 40, 150), make_tensor((2, 150, 3), torch.float32, seed=5).transpose(1, 2)
    with using("triton"), torch.no_grad():
        out = layer(x)
    assert_accurate(out, truth_of(layer, x), zeros=False)


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(format, dtype):
    """Weights and inputs that are their own codes, since the largest of each row has the largest code."""
    plain, top = linear(33, 131, dtype), 448 if format == "fp8" else 127
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(-2, 3, (33, 131), generator=generator)
    whole[:, 0] = top
    whole = prune_24(whole.float())
    plain.weight.data.copy_(whole)
    plain.bias.data.copy_(torch.randint(-8, 9, (33,), generator=generator))
    x = torch.randint(-2, 3, (5, 131), generator=generator)
    x[:, 1] = top
    layer = Sparse24Linear.from_linear(plain, format=format)
    assert torch.equal(layer.decompress(), plain.weight)
    if dtype == torch.float32:
        expected = (x.double() @ whole.T.double() + plain.bias.double()).float()
        with torch.no_grad():
            assert torch.equal(layer(x.to(dtype)), expected)


@EVERY_FORMAT
def test_every_shape_and_layout_of_the_input(format):
    layer, x = sparse(format, 37, 70), make_tensor((4, 6, 70), torch.float32, seed=3)
    inputs = [x[0], x[0, 0], x[:0], x[:, :0], x[1:, ::2], x.transpose(0, 1), x[:1].expand(3, 6, 70),
              x.transpose(1, 2).contiguous().transpose(1, 2)]  # fmt: skip
    with torch.no_grad():
        for given_x in inputs:
            out = layer(given_x)
            assert out.shape == (*given_x.shape[:-1], 37) and out.is_contiguous()
            assert_accurate(out, truth_of(layer, given_x), zeros=False)
            with env.override("FUSEDOPS_VALIDATE", "2"):
                assert torch.equal(layer(given_x), out), "the way that checks"


@EVERY_FORMAT
def test_infinity_and_nan_stay_in_their_row(format):
    layer, x = sparse(format, 20, 64), make_tensor((3, 64), torch.float32, seed=1)
    with torch.no_grad():
        clean = layer(x)
        x[1, 5] = float("nan")
        out = layer(x)
    assert torch.equal(out[::2], clean[::2])
    assert bool(out[1].isnan().all()) if format else bool(out[1, layer.decompress()[:, 5] != 0].isnan().all())


# ---- what is stored


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pruned_weight_is_stored(format, dtype):
    """Kept weights have every bit, or the code that they have in the dense layer of the pruned weight; zeros are 0."""
    plain = linear(24, 100, dtype)
    before = plain.weight.detach().clone()
    layer = Sparse24Linear.from_linear(plain, prune=True, format=format)
    assert torch.equal(plain.weight, before) and layer.bias is plain.bias
    pruned = prune_24(before)
    weight = layer.decompress(torch.float32)
    assert is_24(weight) and not weight[pruned == 0].any()
    if format is None:
        assert torch.equal(layer.decompress(), pruned)
        return
    quantize = {"int8": lambda w: reference.quantize_int8(w, "row"), "fp8": lambda w: reference.quantize_fp8(
        w, "row", FP8)}[format]  # fmt: skip
    values, scale = quantize(pruned)
    assert torch.equal(weight, values.float() * scale[:, None]) and torch.equal(layer.weight_scale, scale)


def test_scores_decide():
    plain = linear(8, 32)
    scores = torch.rand(8, 32, generator=torch.Generator().manual_seed(0))
    layer = Sparse24Linear.from_linear(plain, scores=scores)
    assert torch.equal(layer.decompress(), prune_24(plain.weight.detach(), scores=scores))
    assert not torch.equal(layer.decompress(), prune_24(plain.weight.detach()))


@EVERY_FORMAT
def test_a_weight_that_is_not_24_is_refused(format):
    plain = linear(8, 64)
    plain.weight.data.copy_(prune_24(plain.weight.detach()))
    Sparse24Linear.from_linear(plain, format=format)
    plain.weight.data[5, 32:36] = torch.tensor([0.1, 0.2, 0.0, 0.3])
    with pytest.raises(ValueError, match=r"3 in row 5, group 8 \(columns 32 to 35\)"):
        Sparse24Linear.from_linear(plain, format=format)


@EVERY_FORMAT
def test_layout_is_what_a_weight_becomes(format):
    for dtype in DTYPES:
        layer = sparse(format, 30, 131, dtype)
        layout = Sparse24Linear.layout(131, 30, dtype, **layer.options)
        stored = dict(layer.named_parameters())
        bias = stored.pop("bias")
        assert layout == {key: (tuple(p.shape), p.dtype) for key, p in stored.items()}
        assert layout["weight"] == ((1, 30, 96), FORMATS[format] or dtype) and layout["metadata"][0] == (30, 32)
        assert bias.requires_grad and not any(p.requires_grad for p in stored.values())
        empty = Sparse24Linear(131, 30, dtype=dtype, format=format, dense_below=2)
        with torch.no_grad(), env.override("FUSEDOPS_VALIDATE", "2"):
            for rows in (1, 3):
                assert not empty(make_tensor((rows, 131), dtype, seed=1)).any(), "zeros before it is loaded"
    assert f"in_features=131, out_features=30, bias=True, format={format!r}, dense_below=None" in repr(layer)


@EVERY_FORMAT
def test_decompress_and_back(format):
    layer = sparse(format, 30, 70, torch.bfloat16)
    weight = layer.decompress()
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.decompress(torch.float32).double(), plain_weight(layer), rtol=2**-23, atol=0)
    plain = layer.eval().to_linear()
    assert type(plain) is torch.nn.Linear and not plain.training and plain.weight.requires_grad
    assert torch.equal(plain.weight, weight) and plain.bias.data_ptr() != layer.bias.data_ptr()
    again = Sparse24Linear.from_linear(plain, format=format)
    assert torch.equal(again.metadata, layer.metadata) or format is not None


def test_memory():
    plain = linear(192, 576, torch.bfloat16, bias=False)
    whole = plain.weight.numel() * 2
    for format, limit in ((None, 0.57), ("int8", 0.33), ("fp8", 0.33)):
        layer = Sparse24Linear.from_linear(plain, prune=True, format=format)
        assert sum(p.untyped_storage().nbytes() for p in layer.parameters()) <= limit * whole


# ---- the dense copy


@EVERY_FORMAT
def test_few_rows_take_the_dense_copy(format):
    """Fewer rows than the option says, over all leading dimensions; the results are those of the sparse product."""
    layer, alone = sparse(format, 40, 70, dense_below=6), sparse(format, 40, 70)
    for shape, wanted in (((5,), 0), ((6,), 1), ((2, 3), 1), ((), 0), ((5, 1), 0)):
        x = make_tensor((*shape, 70), torch.float32, seed=1)
        reset_counters()
        with torch.no_grad():
            out = layer(x)
            assert sum(number for (name, _), number in counters().items() if name == "sparse_matmul") == wanted
            if format == "int8":
                assert torch.equal(out, alone(x))
            assert_accurate(out, truth_of(layer, x), zeros=False)


@EVERY_FORMAT
def test_the_dense_copy_is_no_state_and_follows(format):
    layer, other = sparse(format, 24, 70, dense_below=100), sparse(format, 24, 70, seed=5, dense_below=100)
    assert layer.state_dict().keys() == sparse(format, 24, 70).state_dict().keys()
    x = make_tensor((3, 70), torch.float32, seed=1)
    empty = Sparse24Linear(70, 24, device="meta", format=format, dense_below=100)
    empty.load_state_dict(other.state_dict(), assign=True)
    layer.load_state_dict(other.state_dict())
    with torch.no_grad():
        for loaded in (layer, empty, copy.deepcopy(other)):
            assert torch.equal(loaded(x), other(x)) and loaded.dense.data_ptr() != other.dense.data_ptr()
        for changed in (layer.bfloat16(), layer.type(torch.float16)):
            assert changed.dense.dtype == changed.weight.dtype
            few, many = make_tensor((3, 70), changed.dtype, seed=1), make_tensor((100, 70), changed.dtype, seed=1)
            for given_x in (few, many):
                assert_accurate(changed(given_x), truth_of(changed, given_x), zeros=False)


# ---- gradients, dtypes, copies


@EVERY_FORMAT
@pytest.mark.parametrize("dense_below", [None, 100])
def test_gradients(format, dense_below):
    layer = sparse(format, 24, 40, dense_below=dense_below)
    x, grad = make_tensor((2, 3, 40), torch.float32, seed=1), make_tensor((2, 3, 24), torch.float32, seed=2)
    x.requires_grad_()
    out = layer(x)
    out.backward(grad)
    with torch.no_grad():
        assert torch.equal(out, layer(x))
    assert_accurate(x.grad, grad.double() @ layer.decompress().double(), name="grad_x")
    assert_accurate(layer.bias.grad, grad.double().view(-1, 24).sum(0), name="grad_bias")
    assert all(p.grad is None for key, p in layer.named_parameters() if key != "bias")


CONVERSIONS = {
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "type": lambda m: m.type(torch.bfloat16),
    "to meta": lambda m: m.to("meta", torch.bfloat16),
}


@EVERY_FORMAT
@pytest.mark.parametrize("way", CONVERSIONS)
def test_dtypes_of_a_converted_layer(format, way):
    """Values of the layer's dtype follow it as a plain weight does; codes, scales and metadata stay."""
    layer = sparse(format, 24, 70)
    before = copy.deepcopy(layer.state_dict())
    changed = CONVERSIONS[way](torch.nn.Sequential(layer))[0]
    wanted = CONVERSIONS[way](torch.nn.Linear(1, 1)).weight
    follows = ("bias", "weight") if format is None else ("bias",)
    for key, tensor in changed.state_dict().items():
        expected = before[key].to(wanted.device, wanted.dtype) if key in follows else before[key].to(wanted.device)
        assert (tensor.dtype, tensor.device) == (expected.dtype, expected.device), key
        assert tensor.is_meta or torch.equal(tensor.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
    x = make_tensor((2, 70), torch.float32, seed=1).to(wanted)
    with torch.no_grad():
        assert changed(x).dtype == changed.dtype == changed.decompress().dtype == wanted.dtype


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense_below", [None, 100])
def test_an_input_of_another_dtype_than_the_layers(format, dtype, dense_below):
    """Values are rounded to x's dtype, as under autocast."""
    for stored in DTYPES:
        layer, x = sparse(format, 40, 70, stored, dense_below=dense_below), make_tensor((3, 70), dtype, seed=1)
        with torch.no_grad():
            out = layer(x)
        assert out.dtype == dtype
        rounded = layer if format else copy.deepcopy(layer).to(dtype)
        assert_accurate(out, truth_of(rounded, x), zeros=False)


@EVERY_FORMAT
def test_autocast(format):
    layer, x = sparse(format, 24, 40), make_tensor((3, 40), torch.float32, seed=1)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert torch.equal(out, layer(x.bfloat16()))


@EVERY_FORMAT
def test_copies(format):
    layer, x = sparse(format, 24, 40, dense_below=2), make_tensor((3, 40), torch.float32, seed=1)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    with torch.no_grad():
        for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
            assert_same(other.state_dict(), layer.state_dict())
            assert other.weight.data_ptr() != layer.weight.data_ptr() and torch.equal(other(x), layer(x))


@pytest.mark.parametrize("format", [None, "int8"])
def test_compile(format):
    layer = sparse(format, 24, 40)
    with torch.no_grad():
        assert_compiles(layer, *[(make_tensor((rows, 40), torch.float32, seed=rows),) for rows in (3, 5)])


# ---- rejects

PLAIN, LAYER = torch.nn.Linear(40, 24), Sparse24Linear(40, 24, format="int8")
REJECTED = [
    (lambda: Sparse24Linear(0, 24), ValueError, "Sparse24Linear: in_features must be at least 1, got 0"),
    (lambda: Sparse24Linear(2**17 + 1, 1, device="meta", format="int8"), NotImplementedError, "at most MAX_K_INT8"),
    (
        lambda: Sparse24Linear(40, 24, format="int4"),
        ValueError,
        "format must be one of None, 'int8', 'fp8', got 'i",
    ),
    (lambda: Sparse24Linear(40, 24, dense_below=0), ValueError, "dense_below must be None, .measured. or a number"),
    (lambda: Sparse24Linear(40, 24, dense_below=True), ValueError, "dense_below must be None, .measured. or a number"),
    (lambda: Sparse24Linear.from_linear(torch.nn.ReLU(), prune=True), TypeError, "must be a torch.nn.Linear, got ReLU"),
    (lambda: Sparse24Linear.from_linear(torch.nn.ReLU()), TypeError, "linear must be a torch.nn.Linear, got ReLU"),
    (lambda: Sparse24Linear.from_linear(PLAIN, scores=torch.ones(24, 39)), ValueError, "scores must have shape"),
    (lambda: Sparse24Linear.from_linear(PLAIN, format="int5", prune=True), ValueError, "format must be one of"),
    (
        lambda: Sparse24Linear.from_linear(torch.nn.Linear(4, 2).double(), prune=True),
        TypeError,
        "weight must be float",
    ),
    (lambda: LAYER(torch.ones(3, 41)), ValueError, r"x must have shape \[..., K\] with K=40, got \[3, 41\]"),
    (lambda: LAYER(torch.ones(3, 40).double()), TypeError, "x must be float16, bfloat16 or float32, got float64"),
    (lambda: LAYER([1.0]), TypeError, "Sparse24Linear: x must be a torch.Tensor, got list"),
]


@pytest.mark.parametrize("call, error, message", REJECTED)
def test_wrong_input(call, error, message):
    assert_rejected(call, error, message)
