"""A norm's result that exists as quantised rows only, until something else than a quantised linear reads it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fusedops
from fusedops.patch import patch
from fusedops.patch.instance import State, state_of
from fusedops.patch.rows import MAX_READS, READ, QuantizedRows, peek
from tests.patch.quantized_models import EditsItsInput, Parallel, Reads, counted, quantized
from tests.patch.tiny_models import fill, logits, tiny, tokens


def _rows(x=None, made=None):
    """(the rows of x, x itself, their state)."""
    x = torch.randn(2, 3, 8) if x is None else x
    values, scale = fusedops.quantize_int8(x)
    state = State(None)

    def make():
        if made is not None:
            made.append(1)
        return x.clone()

    return QuantizedRows(values, scale, x.dtype, make, state), x, state


def test_what_it_looks_like():
    """Shape, dtype and device cost no numbers."""
    made = []
    rows, x, _ = _rows(torch.randn(2, 3, 8).bfloat16(), made)
    assert rows.shape == x.shape and rows.shape[:-1] == (2, 3) and rows.dtype == torch.bfloat16
    assert rows.device == x.device and rows.stride() == x.stride() and rows.is_contiguous() and rows.dim() == 3
    assert rows.size(-1) == 8 and not rows.requires_grad and rows.numel() == 48 and rows.contiguous() is rows
    assert rows.to(torch.bfloat16) is rows and not made


READINGS = {
    "add": lambda x: x + 1,
    "linear": lambda x: F.linear(x, torch.ones(4, 8)),
    "cat": lambda x: torch.cat([x, torch.zeros(2, 3, 8), x]),
    "view": lambda x: x.view(6, 8),
    "index": lambda x: x[:, 1],
    "unbind": lambda x: list(x),
    "to": lambda x: x.to(torch.float64),
    "operator of ours": lambda x: fusedops.rms_norm(x, torch.ones(8)),
    "quantised again": lambda x: list(fusedops.quantize_int8(x)),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "split": lambda x: list(x.split(4, -1)),
    "in place": lambda x: x.mul_(2),
    "a view, in place": lambda x: (x[0].zero_(), x.clone())[1],
    "out": lambda x: torch.add(x, 1, out=torch.empty(2, 3, 8)),
    "memory": lambda x: torch.tensor(x.untyped_storage().nbytes() + (x.data_ptr() > 0)),
}


@pytest.mark.parametrize("reading", READINGS)
def test_every_operation_sees_the_numbers(reading):
    made = []
    rows, x, state = _rows(made=made)
    with torch.no_grad():
        found, expected = READINGS[reading](rows), READINGS[reading](x.clone())
    assert len(made) == 1 and state.fallbacks == {READ: 1} and rows.values is None
    if reading == "in place":
        assert found is rows
        found = rows.read()
    for mine, stock in zip(*(v if isinstance(v, list) else [v] for v in (found, expected)), strict=True):
        assert type(mine) is torch.Tensor and torch.equal(mine, stock)


def test_peek():
    """Verification looks without leaving a trace."""
    made = []
    rows, x, state = _rows(made=made)
    found = peek({"one": (rows, 3), "other": [x]})
    assert torch.equal(found["one"][0], x) and type(found["one"][0]) is torch.Tensor and found["one"][1] == 3
    assert rows.made is None and rows.values is not None and state.fallbacks == {}
    rows.read().zero_()
    assert peek(rows) is rows.made


def _model(kind):
    torch.manual_seed(0)
    return quantized(fill(kind().eval()))


MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])


@MODES
def test_norm_that_others_read(mode):
    """The numbers are those of before, and after a few times the norm hands on ordinary tensors again."""
    plain, model = _model(Reads), _model(Reads)
    handle, reference = patch(model), patch(plain, linear=False)
    with mode():
        for _ in range(MAX_READS + 3):
            x = torch.randn(2, 3, 64)
            assert torch.equal(model(x), plain(x))
        assert handle.fallbacks() == {("before", READ): MAX_READS}
        fusedops.reset_counters()
        model(x)
    assert ("rms_norm_quantized", "torch") not in fusedops.counters()
    reference.undo()


def test_norm_whose_input_is_changed_before():
    """What cannot be told any more is an error, never a wrong number; without a version, an ordinary norm."""
    plain, model = _model(EditsItsInput), _model(EditsItsInput)
    handle, reference = patch(model), patch(plain, linear=False)
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        assert torch.equal(model(x.clone()), plain(x.clone()))  # only linears take the result
        assert not state_of(model.before).steady
        hook = model.looking.register_forward_pre_hook(lambda module, args: print(args[0].sum()))
        with pytest.raises(RuntimeError, match="an input of a norm or gate was changed in place before its result"):
            model(x.clone())
    with torch.inference_mode():
        found, expected = (one(torch.ones(2, 3, 64)) for one in (model, plain))
    assert torch.equal(found, expected)
    hook.remove()
    handle.undo()
    reference.undo()


@MODES
@pytest.mark.parametrize("place", ["norm", "attention", "down", "gate"])
def test_hooks_that_read_or_change(place, mode):
    """Hooks see ordinary numbers, and what they change in place takes effect."""
    results, seen = [], []
    for fused in (False, True):
        model = quantized(tiny("llama"))
        patch(model, linear=fused)
        layer, sums = model.model.layers[1], []

        def look(tensor, sums=sums):
            sums.append(tensor.sum().item())
            tensor[..., ::3].mul_(2)

        if place == "norm":
            layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: look(out))
        elif place == "attention":
            keyword = {"with_kwargs": True}
            layer.self_attn.register_forward_pre_hook(lambda m, args, kwargs: look(kwargs["hidden_states"]), **keyword)
        elif place == "down":
            layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: look(args[0]))
        else:
            layer.mlp.gate_proj.register_forward_hook(lambda module, args, out: look(out))
        with mode():
            results.append(model(tokens()).logits.clone())
        seen.append(sums)
    assert torch.equal(*results)
    assert seen[0] == pytest.approx(seen[1], rel=1e-4) and len(seen[0]) == 1


@pytest.mark.parametrize("kind", ["norm", "mlp"])
def test_without_the_other_kinds(kind):
    """Only what is replaced quantises; the linears are joined all the same."""
    model, ids = quantized(tiny("llama")), tokens()
    with_it = {"norm": ("rms_norm_quantized", 6), "mlp": ("silu_mul_quantized", 4)}[kind]
    handle = patch(model, linear=False, **{kind: False})
    expected = logits(model, ids)
    handle.undo()
    patch(model, **{kind: False})
    found, calls = counted(model, ids)
    assert torch.equal(found, expected)
    assert with_it[0] not in calls and calls["quantize_int8"] == with_it[1] and calls["int8_matmul"] == 8


class Watching(TorchDispatchMode):
    """Sees every operation of torch."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_norm_in_autocast_or_watched():
    """Where torch chooses the dtype of the product, or something looks at every operation, the result is ordinary."""
    model, x = _model(Parallel), torch.randn(2, 3, 64)
    patch(model)
    with torch.no_grad():
        assert type(model.before(x)) is QuantizedRows
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert type(model.before(x)) is torch.Tensor
            rows = QuantizedRows(*fusedops.quantize_int8(x), x.dtype, lambda: x.clone(), State(None))
            assert model.up(rows).dtype == torch.bfloat16 and rows.made is not None
        with Watching():
            assert type(model.before(x)) is torch.Tensor
    assert type(model.before(x)) is torch.Tensor  # with gradients
    with torch.no_grad():
        model.double()
        assert model.before(x.double()).dtype == torch.float64


def test_copies_of_a_patched_norm():
    """A norm that was copied or pickled quantises on."""
    model, x = _model(Parallel), torch.randn(2, 3, 64)
    patch(model)
    with torch.no_grad():
        expected = model(x)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            fusedops.reset_counters()
            assert torch.equal(again(x), expected)
            assert fusedops.counters()["rms_norm_quantized", "torch"] == 1


class Mixes(nn.Module):
    """Reads its input without any linear of its own."""

    def __init__(self, linear):
        super().__init__()
        self.table = linear.to_linear().weight

    def forward(self, x):
        return F.linear(x, self.table)


@pytest.mark.parametrize("other", [Mixes, lambda up: nn.Sequential(up.to_linear())], ids=["no linear", "not quantised"])
def test_norm_that_another_module_gets(other):
    """Seen beforehand: the result is made once, and quantised once for the linears that take it."""
    model, x = _model(Parallel), torch.randn(2, 3, 64)
    model.up = other(model.up)
    with torch.no_grad():
        expected = model(x)
        handle = patch(model)
        assert state_of(model.before).rows is None
        torch.testing.assert_close(model(x), expected)
    assert handle.fallbacks() == {}
