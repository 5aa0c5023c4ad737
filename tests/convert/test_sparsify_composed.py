"""Sparse models that are quantised and patched, in every order, and trained under a mask."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedops
from fusedops.convert import SCHEMES
from fusedops.convert import handle as convert_handle
from fusedops.convert.schemes import stored_tensors
from fusedops.nn import Masked24Linear, QuantizedLinear, Sparse24Linear
from tests.convert.test_quantize import assert_equal_tensors, distance, state
from tests.patch.quantized_models import counted
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import logits, tiny, tokens, tower


def model_of(family):
    if family == "own":
        return tower()
    pytest.importorskip("transformers")
    return tiny(family)


def sparse_in(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, Sparse24Linear)}


# ---- with quantize_


@pytest.mark.parametrize(("scheme", "keep"), [("int8", True), ("fp8", "cpu")])
def test_quantised_after(scheme, keep):
    """Kept weights get codes, the others stay 0; undone in reverse order, bit for bit, and not in the other."""
    model, ids = tower(), tokens()
    before, tensors, expected = snapshot(model), state(model), logits(model, ids)
    first = fusedops.sparsify_(model, layers="mixing", keep=keep, dense_below=2)
    during, kept, out = snapshot(model), {p: m.decompress() for p, m in sparse_in(model).items()}, logits(model, ids)
    second = fusedops.quantize_(model, scheme, skip="head", keep=keep)
    made = sparse_in(model)
    assert made.keys() == kept.keys() and len(made) == 9
    for path, module in made.items():
        assert module.options == {"format": scheme, "dense_below": 2}
        assert torch.equal(module.metadata, sparse_in(model)[path].metadata)
        again = Sparse24Linear.quantize_weight(kept[path], format=scheme)
        assert torch.equal(module.weight.float(), again["weight"].float())
        assert not module.decompress()[kept[path] == 0].any()
    assert distance(logits(model, ids), out) < (0.08 if scheme == "int8" else 0.25)
    rows = {row.path: row for row in second.report.quantized}
    assert len(rows) == 15 and {rows[path].module for path in made} == {"Sparse24Linear"}
    assert all(0 < row.error < 0.04 and row.scheme == scheme for row in rows.values())
    values = 192 * 64 + 96 * 48  # of two weights [96, 64] and one [64, 96], whose rows are padded to 128 columns
    assert sum(rows[f"floors.0.mixing.w{i}"].bytes_after for i in (1, 2, 3)) < values + 256 * 4 + 256 * 16 + 3 * 96 * 64
    with pytest.raises(RuntimeError, match=r"floors\.0\.mixing\.w1 was replaced after it was sparsified"):
        first.undo()
    second.undo()
    assert_same(during, snapshot(model))
    assert torch.equal(logits(model, ids), out)
    first.undo()
    assert_same(before, snapshot(model))
    assert_equal_tensors(model, tensors)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "weight-only" in name])
def test_schemes_that_have_no_sparse_product(scheme):
    """Sparse linears stay, and the report names the scheme; with nothing else to quantise that is an error."""
    model = tower()
    fusedops.sparsify_(model, layers="mixing")
    report = fusedops.quantize_(model, scheme).report
    assert report.totals["quantized"] == 7 and len(sparse_in(model)) == 9
    assert {row.reason for row in report.skipped} == {f"2:4 sparse, for which {scheme!r} has no product"}
    assert {row.module for row in report.skipped} == {"Sparse24Linear"}
    with pytest.raises(ValueError, match=f"quantize_: model must contain .*2:4 sparse, for which {scheme!r} has no"):
        fusedops.quantize_(model, scheme, skip="looking")


@pytest.mark.parametrize("first_undone", [0, 1])
def test_quantised_before(first_undone):
    """Quantised linears stay; the rest becomes sparse, and both can be undone in either order."""
    model, ids = tower(), tokens()
    before, expected = snapshot(model), logits(model, ids)
    handles = [fusedops.quantize_(model, "int8", skip="mixing", keep=True), fusedops.sparsify_(model, keep=True)]
    report = handles[1].report
    assert report.totals["sparsified"] == 9 and {row.reason for row in report.skipped} == {"quantised already"}
    both = logits(model, ids)
    assert distance(both, expected) > 0.1
    handles[first_undone].undo()
    assert not torch.equal(logits(model, ids), both)
    handles[1 - first_undone].undo()
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model, ids), expected)


def test_quantised_twice():
    model = tower()
    fusedops.sparsify_(model)
    fusedops.quantize_(model, "int8")
    with pytest.raises(ValueError, match="quantize_: model must contain .*quantised already"):
        fusedops.quantize_(model, "fp8")
    with pytest.raises(ValueError, match="sparsify_: model must contain .*2:4 sparse already"):
        fusedops.sparsify_(model)


def test_smoothing():
    """Factors move into sparse weights and out of their rows, and no zero becomes another number."""
    model, ids = tower(), tokens()
    fusedops.sparsify_(model, method="wanda", calibration=[ids])
    kept, out = {p: m.decompress() for p, m in sparse_in(model).items()}, logits(model, ids)
    handle = fusedops.quantize_(model, "int8", calibration=[ids], keep=True)
    assert len(handle.report.folded) > 8 and len(sparse_in(model)) == 16
    for path, module in sparse_in(model).items():
        weight = module.decompress()
        assert not weight[kept[path] == 0].any() and weight.any()
    assert distance(logits(model, ids), out) < 0.08
    handle.undo()
    assert torch.equal(logits(model, ids), out)


def test_static_is_refused():
    model, ids = tower(), tokens()
    fusedops.sparsify_(model, layers="w1")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"static must be False, .*a 2:4 sparse .*True with floors\.0\.mixing\.w1"
    ):
        fusedops.quantize_(model, "int8", calibration=[ids], static=True)
    assert_same(before, snapshot(model))


def test_tied_sparse_weights_stay_tied():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    fusedops.sparsify_(model)
    fusedops.quantize_(model, "int8")
    assert model[0].weight is model[1].weight and model[0].metadata is model[1].metadata
    assert model[0].weight.dtype == torch.int8 and model[0].weight_scale is model[1].weight_scale


# ---- with patch


@pytest.mark.parametrize(("family", "scheme"), [("own", None), ("own", "fp8"), ("llama", "int8"), ("gemma3", None)])
def test_patched_after(family, scheme):
    """Sparse linears with one input are one product, those of int8 after a norm that quantises; the bits stay."""
    model, ids = model_of(family), tokens()
    exact = scheme == "int8"  # whose sums are
    before, expected = snapshot(model), logits(model, ids)
    handles = [fusedops.sparsify_(model, keep=True)]
    if scheme is not None:
        handles.append(fusedops.quantize_(model, scheme, keep=True))
    plain, calls = counted(model, ids)
    apart = fusedops.patch(model, linear=False)
    out = logits(model, ids)
    apart.undo()
    patched = fusedops.patch(model)
    for _ in range(2):
        found, after = counted(model, ids)
        assert torch.equal(found, out) if exact else distance(found, out) < 1e-6
        assert after["sparse_matmul"] < calls["sparse_matmul"]
    rows = [row for row in patched.report.rows if row.kind == "linear" and row.status == "replaced"]
    assert rows and {row.module for row in rows} == {"Sparse24Linear"} and patched.fallbacks() == {}
    assert {row.replacement.split()[0] for row in rows} == {"sparse_matmul"}
    norms = [row.replacement.split("(")[0] for row in patched.report.rows if row.kind == "norm"]
    assert ("rms_norm_quantized" in norms) == (scheme is not None)
    with pytest.raises(RuntimeError, match="was patched after it was"):
        handles[-1].undo()
    patched.undo()
    assert torch.equal(logits(model, ids), plain)
    for handle in reversed(handles):
        handle.undo()
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize(("family", "first"), [("own", "patch"), ("llama", "sparsify")])
def test_patched_before(family, first):
    """A patched model is sparsified like any other; either can be undone first."""
    model, ids = model_of(family), tokens()
    before, tensors, expected = snapshot(model), state(model), logits(model, ids)
    patched = fusedops.patch(model)
    handle = fusedops.sparsify_(model, method="wanda", calibration=[ids], keep=True)
    both = logits(model, ids)
    assert distance(both, expected) > 0.1 and patched.fallbacks() == {}
    if first == "patch":
        patched.undo()
        assert distance(logits(model, ids), both) < 1e-4
        handle.undo()
    else:
        handle.undo()
        assert distance(logits(model, ids), expected) < 1e-4
        patched.undo()
    assert_same(before, snapshot(model))
    assert_equal_tensors(model, tensors)
    assert torch.equal(logits(model, ids), expected)


def test_a_dense_copy_is_not_joined():
    model, ids = tower(), tokens()
    fusedops.sparsify_(model, layers="mixing", dense_below=100)
    expected = logits(model, ids)
    report = fusedops.patch(model).report
    reasons = {row.path: row.reason for row in report.rows if row.kind == "linear"}
    assert set(reasons.values()) == {"it keeps a dense copy of its weight"} and len(reasons) == 6
    assert distance(logits(model, ids), expected) < 1e-4


def test_a_patched_copy():
    """Joined sparse weights are apart again in a copy."""
    model, ids = tower(), tokens()
    fusedops.sparsify_(model, layers="mixing")
    fusedops.patch(model)
    expected = logits(model, ids)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), expected)
    with torch.no_grad():
        other.floors[0].mixing.w1.weight.zero_()
    assert torch.equal(logits(model, ids), expected) and not torch.equal(logits(other, ids), expected)


# ---- training


def train(model, steps=4, **options):
    ids, optimizer, losses = tokens(), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options), []
    for _ in range(steps):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_train_and_convert():
    """A pruned transformer learns with its zeros, and its conversion has the very weights and the same results."""
    model, names = tower(), list(tower().state_dict())
    parameters = dict(model.named_parameters())
    masked = fusedops.sparsify_(model, method="wanda", calibration=[tokens()], train=True)
    assert "16 linears, 2:4" in repr(masked) and list(model.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    before = {path: m.mask.clone() for path, m in model.named_modules() if isinstance(m, Masked24Linear)}
    losses = train(model, weight_decay=0.01)
    assert len(before) == 16 and losses[-1] < losses[0]
    for path, mask in before.items():
        weight = parameters[f"{path}.weight"].detach()
        assert torch.equal(weight != 0, mask) and fusedops.is_24(weight)
    ids = tokens(3, 20, seed=5)
    expected, weights = logits(model, ids), {path: parameters[f"{path}.weight"].detach().clone() for path in before}
    handle = masked.convert(keep=True)
    assert sparse_in(model).keys() == before.keys() and handle.report.totals["sparsified"] == 16
    for path, module in sparse_in(model).items():
        assert torch.equal(module.decompress(), weights[path])
    assert distance(logits(model, ids), expected) < 1e-5
    for use in (masked.convert, masked.undo):
        with pytest.raises(RuntimeError, match="converted"):
            use()
    handle.undo()
    assert all(type(module) is not Masked24Linear for module in model.modules())
    assert torch.equal(logits(model, ids), expected) and model.head.weight is parameters["head.weight"]
    int8 = fusedops.sparsify_(model).model
    assert distance(logits(fusedops.quantize_(int8, "int8").model, ids), expected) < 0.08


@pytest.mark.parametrize("keep", [False, True])
def test_undo_of_training(keep):
    """The same modules and parameters; with `keep` the values from before, else those of now, with their zeros."""
    model = tower()
    before, tensors = snapshot(model), state(model)
    with fusedops.sparsify_(model, train=True, keep=keep, layers="mixing") as masked:
        train(model, 2)
        weight = model.floors[0].mixing.w1.weight.detach().clone()
    assert_same(before, snapshot(model))
    first = model.floors[0].mixing.w1.weight
    assert torch.equal(first, tensors["floors.0.mixing.w1.weight"] if keep else weight)
    masked.undo()
    with pytest.raises(RuntimeError, match="convert: the model must be sparsified for training, but it was converted"):
        masked.convert()


def test_momentum_from_before():
    """What an optimizer adds to dropped weights gets neither into the conversion nor back into the model."""
    model, ids = tower(), tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    step()
    masked = fusedops.sparsify_(model, train=True)
    step()
    assert not fusedops.is_24(model.head.weight.detach()), "else this test shows nothing"
    expected, other = logits(model, ids), copy.deepcopy(model)
    masked.convert()
    assert distance(logits(model, ids), expected) < 1e-5
    other.load_state_dict(other.state_dict())
    assert torch.equal(logits(other, ids), expected) and fusedops.is_24(other.head.weight.detach())


def test_resuming():
    """A state dict of a model in training, loaded into a plain one and masked by magnitude, goes on where it was."""
    model, ids = tower(), tokens()
    fusedops.sparsify_(model, method="wanda", calibration=[ids], train=True)
    train(model, 2)
    other = tower()
    other.load_state_dict(model.state_dict())
    fusedops.sparsify_(other, train=True)
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert train(other) == train(model)


def test_something_else_was_put_in():
    model = tower()
    masked = fusedops.sparsify_(model, train=True)
    ours, model.head = model.head, nn.Linear(64, 128)
    for use in (masked.convert, masked.undo):
        with pytest.raises(RuntimeError, match="head was replaced after it was sparsified"):
            use()
    model.head = ours
    model.head.weight.data[0, :4] = float("nan")
    with pytest.raises(ValueError, match="convert: weights must be finite, got NaN or infinity in head"):
        masked.convert()
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_what_was_kept_goes_where_the_model_is(monkeypatch):
    """All that holds a sparse weight, and no bias, which stayed in the model; there is one device here to go to."""
    model, moved = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), []
    fusedops.sparsify_(model, dense_below=2)
    linears = list(model)
    monkeypatch.setattr(convert_handle, "_move", lambda linear, device: moved.append((linear, device.type)))
    handle = fusedops.quantize_(model, "int8", keep="cpu")
    assert moved == [(linear, "cpu") for linear in linears]
    model.to("meta")
    handle.undo()
    assert moved[2:] == [(linear, "meta") for linear in linears]
    held = [linears[0].weight, linears[0].metadata, linears[0].dense]
    assert {id(tensor) for tensor in stored_tensors(linears[0])} == {id(tensor) for tensor in held}
