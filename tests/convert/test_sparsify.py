"""`sparsify_` on whole models: what is kept, report, undo, ties, failures, and what it refuses."""

import gc
import json
import math
import weakref

import pytest
import torch
from torch import nn

import fusedops
from fusedops.convert import MaskedModel, SparsifiedModel
from fusedops.nn import Masked24Linear, Sparse24Linear
from tests.convert.test_quantize import assert_equal_tensors, distance, state
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import logits, tiny, tokens, tower

MLP = {f"floors.{i}.mixing.w{j}" for i in range(3) for j in (1, 2, 3)}


def inputs_of(model, paths, batches):
    """{path: every input of a linear as one float64 matrix}, by hooks of this test's own."""
    found, hooks = {path: [] for path in paths}, []
    for path in paths:
        keep = lambda module, args, path=path: found[path].append(args[0].double().flatten(0, -2))  # noqa: E731
        hooks.append(model.get_submodule(path).register_forward_pre_hook(keep))
    for batch in batches:
        logits(model, batch)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(rows) for path, rows in found.items()}


def kept_of_four(weight, scores):
    """The weight with the two of each four columns that have the largest scores, one group after the other."""
    out = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], 4):
            places = sorted(range(first, min(first + 4, weight.shape[1])), key=lambda k: (-scores[row, k], k))[:2]
            out[row, places] = weight[row, places]
    return out


@pytest.mark.parametrize("keep", [True, "cpu"])
def test_whole_model(keep):
    """Every linear is replaced in its place, the model computes what plain linears with zeros do, undo restores all."""
    model, ids = tower(), tokens()
    before, tensors, expected = snapshot(model), state(model), logits(model, ids)
    handle = fusedops.sparsify_(model, keep=keep)
    assert type(handle) is SparsifiedModel and handle.report.totals["sparsified"] == 16 and not handle.report.skipped
    for name, module in model.named_modules():
        assert type(module) is not nn.Linear
        if isinstance(module, Sparse24Linear):
            assert torch.equal(module.decompress(), fusedops.prune_24(tensors[f"{name}.weight"]))
    out = logits(model, ids)
    assert distance(out, expected) > 0.1
    handle.dequantize()
    assert type(model.head) is nn.Linear and distance(logits(model, ids), out) < 1e-5
    handle.undo()
    assert_same(before, snapshot(model))
    assert_equal_tensors(model, tensors)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("train", [False, True])
def test_wanda_keeps_what_weighs_most(train):
    """Of each four the two with the largest ``|W| * |x|``, over all batches, of the inputs in the dense model."""
    model, batches, path = tower(), [tokens(seed=1), tokens(3, 7, seed=2)], "floors.1.mixing.w2"
    weight = model.get_submodule(path).weight.detach().clone()
    x = inputs_of(model, [path], batches)[path]
    scores = weight.double().abs() * x.square().sum(0).sqrt()
    expected = kept_of_four(weight, scores)
    handle = fusedops.sparsify_(model, method="wanda", calibration=batches, layers="mixing", train=train, keep=True)
    made = model.get_submodule(path)
    found = made.weight if train else made.decompress()
    assert torch.equal(found, expected) and not torch.equal(expected, fusedops.prune_24(weight))
    handle.undo()
    assert torch.equal(model.get_submodule(path).weight, weight)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("train", [False, True])
def test_report(method, train):
    """Kept norm and error of outputs, against their definitions; bytes against the tensors."""
    model, batches = tower(), [tokens(seed=1), tokens(3, 7, seed=2)]
    weights = {path: model.get_submodule(path).weight.detach().double() for path in MLP}
    weights = {path: weight.clone() for path, weight in weights.items()}
    x = inputs_of(model, MLP, batches)
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    report = fusedops.sparsify_(model, method=method, calibration=batches, layers="mixing", train=train).report
    rows = report.masked if train else report.sparsified
    assert {row.path for row in rows} == MLP and len(report.skipped) == 7
    assert {row.reason for row in report.skipped} == {"not named in layers"}
    for row in rows:
        made, whole = model.get_submodule(row.path), weights[row.path]
        kept = made.weight.detach().double() if train else made.decompress().double()
        assert row.kept == pytest.approx(float(kept.norm() / whole.norm()), rel=1e-5)
        error = (x[row.path] @ (whole - kept).T).norm() / (x[row.path] @ whole.T).norm()
        assert row.output_error == pytest.approx(float(error), rel=1e-4)
        N, K = whole.shape
        after = N * K * 4 if train else N * (math.ceil(K / 64) * 128 + math.ceil(K / 128) * 16)
        assert (row.module, row.shape, row.scheme, row.bytes_before) == ("Linear", (N, K), "2:4", N * K * 4)
        assert row.bytes_after == after and (train or row.error == pytest.approx((1 - row.kept**2) ** 0.5, rel=1e-3))
    totals, text = report.totals, str(report)
    assert totals["masked" if train else "sparsified"] == 9 and totals["model_bytes_before"] == held
    assert json.loads(json.dumps(report.as_dict()))["totals"] == totals
    assert ("trained with the dropped weights at 0" if train else "2:4 sparse") == text.splitlines()[0]
    worst = max(row.output_error for row in rows if row.path.endswith("w1"))
    assert f"of the norm, error of outputs at most {worst:.2%}" in text
    if not train:
        assert totals["bytes_after"] == sum(row.bytes_after for row in rows)
        held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        assert totals["model_bytes_after"] == held


def test_wanda_is_better_than_magnitude():
    """By the error of what the linears give on the calibration's inputs, of every kind of layer."""
    errors = {}
    for method in ("magnitude", "wanda"):
        rows = fusedops.sparsify_(tower(), method=method, calibration=[tokens(8, 24)]).report.sparsified
        errors[method] = {row.path: row.output_error for row in rows}
    better = [errors["wanda"][path] < errors["magnitude"][path] for path in errors["wanda"]]
    assert sum(better) >= 14 and len(better) == 16


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"layers": "mixing"}, 9),
        ({"layers": ["w1", "floors.0.looking.all_in"]}, 4),
        ({"layers": "floors.?.mixing.w[12]"}, 6),
        ({"layers": "mixing", "skip": "w2"}, 6),
        ({"layers": ("floors.0", "floors")}, 15),
        ({"skip": ("head", "w1")}, 12),
    ],
)
def test_layers(options, number):
    model = tower()
    handle = fusedops.sparsify_(model, **options)
    assert handle.report.totals["sparsified"] == number == sum(isinstance(m, Sparse24Linear) for m in model.modules())
    assert handle.report.unmatched == ()


def test_dense_below():
    """Few rows take the dense copy, whose bytes the report counts."""
    model, ids = tower(), tokens(1, 4)
    plain = fusedops.sparsify_(tower(), layers="mixing").report
    report = fusedops.sparsify_(model, layers="mixing", dense_below=5).report
    assert report.rows[0].status == "skipped" and report.totals["bytes_before"] == plain.totals["bytes_before"]
    assert report.totals["bytes_after"] == plain.totals["bytes_after"] + plain.totals["bytes_before"]
    fusedops.reset_counters()
    few = logits(model, ids)
    assert not any(name == "sparse_matmul" for name, _ in fusedops.counters())
    logits(model, tokens(1, 5))
    assert any(name == "sparse_matmul" for name, _ in fusedops.counters())
    for module in model.modules():
        module.__dict__.get("options", {})["dense_below"] = None
    assert distance(logits(model, ids), few) < 1e-5


@pytest.mark.parametrize("train", [False, True])
def test_tied_weights(train):
    """One weight is pruned once, by the inputs of both of its linears together, and stays one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    weight, x = model[0].weight.detach().clone(), torch.randn(50, 64) * torch.linspace(0.01, 3, 64)
    first = model[0](x).detach().tanh()
    norms = (x.double().square().sum(0) + first.double().square().sum(0)).sqrt()
    handle = fusedops.sparsify_(model, method="wanda", calibration=[x], train=train, dense_below=2, keep=True)
    expected = kept_of_four(weight, weight.double().abs() * norms)
    assert model[0].weight is model[2].weight and model[0].weight is not model[3].weight
    assert handle.report.rows[1].bytes_before == handle.report.rows[1].bytes_after == 0
    assert handle.report.rows[0].kept == handle.report.rows[1].kept < 1
    if train:
        assert model[0].mask is model[2].mask
        out = model(x)
        converted = handle.convert()
        assert torch.allclose(model(x), out, atol=1e-5)
        assert handle is not converted
    assert model[0].metadata is model[2].metadata and model[0].dense is model[2].dense
    assert torch.equal(model[2].decompress(), expected)


def test_a_weight_that_an_embedding_uses_stays():
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    report = fusedops.sparsify_(model).report
    assert type(model[1]) is nn.Linear and isinstance(model[2], Sparse24Linear)
    assert [row.reason for row in report.skipped] == ["its weight is also 0.weight"]


def test_undo_without_keep():
    model = tower()
    gone = [weakref.ref(module.weight) for module in model.modules() if type(module) is nn.Linear]
    handle = fusedops.sparsify_(model)
    gc.collect()
    assert len(gone) == 16 and not any(ref() is not None for ref in gone)
    with pytest.raises(RuntimeError, match="undo: the float weights were dropped; pass keep=True to sparsify_"):
        handle.undo()
    with pytest.raises(RuntimeError, match="sparsify_: as a context manager it needs keep=True"), handle:
        pass


@pytest.mark.parametrize("failing", [0, 3, 5, 17])
@pytest.mark.parametrize("train", [False, True])
def test_failure_midway(train, failing):
    """Nothing half-done: an interrupt leaves every module and every bit of every weight as it was."""
    model, ids, calls = tower(), tokens(), iter(range(100))
    before, tensors = snapshot(model), state(model)

    def fail(*done):
        if next(calls) == failing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fusedops.sparsify_(model, method="wanda", calibration=[ids], train=train, progress=fail)
    assert_same(before, snapshot(model))
    assert_equal_tensors(model, tensors)


def test_progress():
    for method, passes in (("magnitude", 1), ("wanda", 2)):
        seen, batches = [], [tokens(seed=i) for i in range(3)]
        progress = lambda *a: seen.append(a)  # noqa: B023, E731
        fusedops.sparsify_(tower(), method=method, calibration=batches, layers="w1", progress=progress)
        assert seen == [(i, 3 * passes + 3) for i in range(1, 3 * passes + 4)]
    seen.clear()
    fusedops.sparsify_(tower(), train=True, progress=lambda *a: seen.append(a))
    assert seen == [(i, 16) for i in range(1, 17)]


def test_modes_and_biases_stay():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64, bias=False)).eval()
    model[0].train()
    bias = model[0].bias
    fusedops.sparsify_(model, method="wanda", calibration=[torch.randn(4, 64)])
    assert model[0].training and not model[1].training and not model[2].training
    assert model[0].bias is bias and model[2].bias is None and not model[0]._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_families(family):
    """Models of transformers run sparse; packed experts are no linears and stay."""
    pytest.importorskip("transformers")
    model, ids = tiny(family, torch.bfloat16), tokens()
    expected = logits(model, ids)
    handle = fusedops.sparsify_(model, method="wanda", calibration=[ids], keep=True)
    out = logits(model, ids)
    assert [row.path for row in handle.report.skipped] == ["lm_head"] and not torch.equal(out, expected)
    linears = [path for path, module in model.named_modules() if isinstance(module, Sparse24Linear)]
    sparse = {path: model.get_submodule(path).decompress() for path in linears}
    handle.undo()
    assert torch.equal(logits(model, ids), expected)
    with torch.no_grad():
        for path, weight in sparse.items():
            model.get_submodule(path).weight.copy_(weight)
    assert distance(out.float(), logits(model, ids).float()) < 0.02


def test_pruned_already():
    """Nothing is lost, and pruning twice is pruning once."""
    model, ids = tower(), tokens()
    with fusedops.sparsify_(model, train=True) as masked:
        assert type(masked) is MaskedModel and isinstance(model.head, Masked24Linear)
    expected = logits(model, ids)
    report = fusedops.sparsify_(model).report
    assert all(row.kept == 1 and row.error == 0 for row in report.sparsified)
    assert distance(logits(model, ids), expected) < 1e-6
    with pytest.raises(ValueError, match="sparsify_: model must contain .*: 2:4 sparse already"):
        fusedops.sparsify_(model)
    with pytest.raises(ValueError, match="fake_quantize_: model must contain .*: 2:4 sparse already"):
        fusedops.fake_quantize_(model, "int8")


class Idle(nn.Module):
    """Has a linear that it does not call."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.used(input=x)


def test_a_linear_that_is_not_reached():
    model, x = Idle(), torch.randn(3, 64)
    with pytest.raises(ValueError, match="must have a calibration for every linear; it did not reach idle"):
        fusedops.sparsify_(model, method="wanda", calibration=[x])
    with pytest.raises(ValueError, match="it gave NaN or infinity to used"):
        fusedops.sparsify_(model, method="wanda", calibration=[x / 0], layers="used")
    assert type(model.used) is nn.Linear and not model.used._forward_pre_hooks
    rows = fusedops.sparsify_(model, calibration=[x]).report.rows
    assert rows[0].output_error > 0 and rows[1].output_error is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "random"}, ValueError, "method must be one of 'magnitude', 'wanda', got 'random'"),
        ({"method": None}, ValueError, "method must be one of"),
        ({"method": "wanda"}, ValueError, "calibration must hold model inputs for method 'wanda', got None"),
        ({"method": "wanda", "calibration": []}, ValueError, "calibration must hold at least one batch, got none"),
        ({"calibration": 3}, TypeError, "calibration must hold model inputs, got int"),
        ({"layers": "mlp"}, ValueError, "layers must name linears or modules around them, got 'mlp', which names none"),
        ({"layers": ["w1", "roof"]}, ValueError, "layers must name linears .*, got 'roof', which names none"),
        ({"layers": ()}, ValueError, r"model must contain a torch.nn.Linear .*: not named in layers"),
        ({"layers": 3}, TypeError, "layers must hold names, got int"),
        ({"layers": "w1", "skip": "mixing"}, ValueError, r"model must contain .*named in skip \('mixing'\)"),
        ({"skip": [3]}, TypeError, "skip must hold names, got 3"),
        ({"dense_below": -1}, ValueError, "dense_below must be None, .measured. or a number of rows from 1, got -1"),
        ({"keep": "disk"}, ValueError, "keep must be False, True or 'cpu', got 'disk'"),
        ({"keep": "cpu", "train": True}, ValueError, "keep must be False or True with train, got 'cpu'"),
        ({"train": 1}, TypeError, "train must be a bool, got int"),
        ({"progress": 3}, TypeError, "progress must be callable, got int"),
    ],
)
def test_bad_options(options, error, message):
    model = tower()
    before = snapshot(model)
    with pytest.raises(error, match=f"sparsify_: .*{message}"):
        fusedops.sparsify_(model, **options)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ([1], TypeError, "sparsify_: model must be a torch.nn.Module, got list"),
        (nn.Linear(64, 64), ValueError, "model must hold its linears as children, got a Linear itself"),
        (nn.Sequential(nn.ReLU()), ValueError, r"must contain a torch.nn.Linear .*got Sequential \(it has none"),
        (nn.Sequential(nn.Linear(4, 9)), ValueError, r"got Sequential \(0: too small"),
        (nn.Sequential(nn.Linear(64, 9, device="meta")), ValueError, "must be loaded, got 0 on the meta"),
        (nn.Sequential(nn.Linear(64, 9).double()), ValueError, "its weight is float64"),
    ],
)
def test_bad_model(model, error, message):
    with pytest.raises(error, match=message):
        fusedops.sparsify_(model)


@pytest.mark.parametrize("train", [False, True])
def test_weights_must_be_finite(train):
    model = tower()
    model.floors[2].mixing.w2.weight.data[3, 5] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"weights must be finite, got NaN or infinity in floors\.2\.mixing\.w2"):
        fusedops.sparsify_(model, train=train)
    assert_same(before, snapshot(model))
