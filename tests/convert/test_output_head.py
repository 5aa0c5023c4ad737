"""Output embeddings that are quantised: alone, and together with the embedding that has their weight."""

import copy
import io

import pytest
import torch
from torch import nn

import fusedops
from fusedops.nn import QuantizedEmbedding, WeightOnlyLinear
from tests.convert.test_select import skipped
from tests.patch.tiny_models import logits, tiny, tokens, tower

WEIGHT_ONLY = pytest.mark.parametrize("scheme", ["int8-weight-only", "fp8-weight-only", "int4-weight-only"])


def tied():
    model = tower()
    model.head.weight = model.words.weight
    return model


@WEIGHT_ONLY
def test_one_copy_serves_both(scheme):
    """The embedding gives the rows of the matrix that the head multiplies by, and nothing is stored twice."""
    model, ids = tied(), tokens()
    words, head, before = model.words, model.head, logits(tied_like(model), ids)
    handle = fusedops.quantize_(model, scheme, output_head=True, keep=True)
    assert type(model.words) is QuantizedEmbedding and type(model.head) is WeightOnlyLinear
    assert model.words._parameters.keys() == model.head._parameters.keys() - {"bias"}
    for name, parameter in model.words._parameters.items():
        assert parameter is getattr(model.head, name)
    weight = model.head.dequantize()
    assert torch.equal(model.words(ids), weight[ids]) and torch.equal(model.words.dequantize(), weight)
    assert torch.equal(model.words(ids.int()[:0]), weight[ids[:0]])
    rows = {row.path: row for row in handle.report.quantized}
    assert rows["words"].module == "Embedding" and rows["words"].error == rows["head"].error
    assert rows["head"].bytes_before == 4 * head.weight.numel() and rows["words"].bytes_before == 0
    assert rows["words"].bytes_after == 0 and not handle.report.skipped
    after = logits(model, ids)
    assert torch.equal(after, logits(model, ids)) and not torch.equal(after, before)
    handle.undo()
    assert model.words is words and model.head is head and head.weight is words.weight
    assert torch.equal(logits(model, ids), before)


def tied_like(model):
    return copy.deepcopy(model)


@WEIGHT_ONLY
def test_a_plain_model_of_the_dequantised_weights(scheme):
    """dequantize puts plain modules in, tied again, with the very numbers that the codes stand for."""
    model, ids = tied(), tokens()
    handle = fusedops.quantize_(model, scheme, output_head=True)
    weight, embedded = model.head.dequantize(), model.words(ids)
    handle.dequantize()
    assert type(model.words) is nn.Embedding and type(model.head) is nn.Linear
    assert model.words.weight is model.head.weight and torch.equal(model.head.weight, weight)
    assert torch.equal(model.words(ids), embedded)


@WEIGHT_ONLY
def test_copies_and_files_keep_the_tie(scheme):
    model, ids = tied(), tokens()
    fusedops.quantize_(model, scheme, output_head=True)
    wanted = logits(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    other = tied()
    other.words.weight.data.neg_()
    fusedops.quantize_(other, scheme, output_head=True)
    assert not torch.equal(logits(other, ids), wanted)
    other.load_state_dict(model.state_dict())
    for made in (copy.deepcopy(model), loaded, other):
        assert torch.equal(logits(made, ids), wanted) and made.words.weight is made.head.weight
    broken = model.state_dict() | {"words.weight_scale": torch.ones(3)}
    with pytest.raises(RuntimeError, match="QuantizedEmbedding: words.weight_scale must be .* of shape"):
        other.load_state_dict(broken)
    model.to(torch.bfloat16)
    assert model.words.dtype == torch.bfloat16 == model.words(ids).dtype and model.words.weight.dtype.itemsize == 1


def test_heads_without_a_tie():
    """lm_head is no default of skip then; an explicit skip is obeyed; the schemes of both sides take no tied weight."""
    model = nn.ModuleDict({"lm_head": nn.Linear(64, 128), "other": nn.Linear(64, 64)})
    assert skipped(copy.deepcopy(model)) == {"lm_head": "named in skip ('lm_head')"}
    fusedops.quantize_(model, "int8", output_head=True)
    assert isinstance(model["lm_head"], fusedops.nn.Int8Linear)
    for scheme, options, reason in (
        ("int8", {}, "its weight is also words.weight"),
        ("int8-weight-only", {"skip": ("head",)}, "named in skip ('head')"),
        ("int8-weight-only", {"skip": ("words",)}, "its weight is also words.weight"),
    ):
        model = tied()
        report = fusedops.quantize_(model, scheme, output_head=True, **options).report
        assert {row.path: row.reason for row in report.skipped} == {"head": reason}
        assert type(model.words) is nn.Embedding and model.words.weight is model.head.weight
    with pytest.raises(TypeError, match=r"quantize_: output_head must be True or False, got 'lm_head'"):
        fusedops.quantize_(tower(), "int8", output_head="lm_head")


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


@pytest.mark.parametrize(
    "words",
    [
        lambda weight: Scaled(*weight.shape),
        lambda weight: nn.Embedding(*weight.shape, max_norm=1.0),
        lambda weight: hooked(nn.Embedding(*weight.shape)),
    ],
    ids=["subclass", "max_norm", "hook"],
)
def test_embeddings_with_more_to_them_stay(words):
    model = tower()
    model.words = words(model.head.weight)
    model.words.weight = model.head.weight
    before = model.words
    report = fusedops.quantize_(model, "int8-weight-only", output_head=True).report
    assert [(row.path, row.reason) for row in report.skipped] == [("head", "its weight is also words.weight")]
    assert model.words is before and type(model.head) is nn.Linear


def hooked(module):
    module.register_forward_hook(lambda *call: None)
    return module


def test_language_model():
    """A Llama with a tied head, patched too, gives the logits of the plain model with the dequantised weights."""
    model, ids = tiny("llama", tie_word_embeddings=True), tokens()
    fusedops.quantize_(model, "int8-weight-only", output_head=True)
    assert type(model.get_input_embeddings()) is QuantizedEmbedding
    plain = copy.deepcopy(model)
    for path, module in list(plain.named_modules()):
        if isinstance(module, WeightOnlyLinear):
            plain.set_submodule(path, module.to_linear())
        elif isinstance(module, QuantizedEmbedding):
            plain.set_submodule(path, module.to_embedding())
    wanted = logits(plain, ids)
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-4, atol=1e-5)
    with fusedops.patched(model):
        torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-4, atol=1e-4)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.int8


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.zeros(2), TypeError, "input must be int32 or int64, got torch.float32"),
        ([0], TypeError, "input must be a torch.Tensor"),
        (torch.tensor([7]), IndexError, "index out of range"),
        (torch.tensor([-1]), IndexError, "index out of range"),
    ],
)
def test_rejects(given, error, message):
    with pytest.raises(error, match=message):
        QuantizedEmbedding(7, 8)(given)
    with pytest.raises(ValueError, match="QuantizedEmbedding: embedding_dim must be at least 1, got 0"):
        QuantizedEmbedding(7, 0)
