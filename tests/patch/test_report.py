"""The report, the dry run, and the errors of the public function."""

import json

import pytest
import torch
from torch import nn

from fusedops.patch import continuous, patch
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import tiny, tokens, tower

TEXT = """\
replaced
      2 x attention  GptOssAttention     -> attention(sinks)
      5 x norm       GptOssRMSNorm       -> rms_norm()
      2 x rotary     GptOssAttention     -> rotary() in place of apply_rotary_pos_emb
      2 x residual   GptOssDecoderLayer  -> 2 x residual addition and norm in one pass
skipped
      2 x mlp        GptOssExperts  - the experts' gate is neither silu(gate) * up nor gelu(gate) * up
continuous batching
  """
ENGINE = "generate_batch -> paged_attention; attention_varlen where a window slides"


def test_text():
    pytest.importorskip("transformers")
    reason = continuous.unsupported()
    assert str(patch(tiny("gpt_oss")).report) == TEXT + (f"not available: {reason}" if reason else ENGINE)


def test_rows_and_dict():
    report = patch(tower(), verify={"ids": tokens()}).report
    assert [row.path for row in report.replaced if row.kind == "mlp"] == [f"floors.{i}.mixing" for i in range(3)]
    again = json.loads(json.dumps(report.as_dict()))
    assert again["counts"] == report.counts and len(again["rows"]) == 16 and len(again["measured"]) == 5
    assert "verified" in str(report) and "whole model" in str(report)


def test_dry_run():
    """Everything is reported and nothing is touched; undoing nothing is fine."""
    model = tower()
    before = snapshot(model)
    handle = patch(model, dry_run=True)
    assert_same(before, snapshot(model))
    assert handle.report.dry_run and str(handle.report).startswith("would be replaced\n")
    assert handle.report.counts == {"attention": 0, "norm": 7, "mlp": 3, "rotary": 3, "residual": 3, "linear": 0}
    handle.undo()
    patch(model)


@pytest.mark.parametrize("kind", ["norm", "mlp", "rotary", "residual"])
def test_one_kind_switched_off(kind):
    counts = patch(tower(), **{kind: False}).report.counts
    expected = {"attention": 0, "norm": 7, "mlp": 3, "rotary": 3, "residual": 3, "linear": 0, kind: 0}
    if kind == "norm":
        expected["residual"] = 0  # nothing to hand the sum's norm to
    assert counts == expected


def test_nothing_recognised():
    """B44 (linkedin/Liger-Kernel#369, #920): zero replacements are an error that says what was looked for."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match="patch: model must contain something to replace, got Sequential with none of:"
    ):
        patch(model)
    with pytest.raises(ValueError) as error:
        patch(model, mlp=False)
    assert "RMS norms" in str(error.value) and "gated MLPs" not in str(error.value)
    handle = patch(model, strict=False)
    assert handle.report.counts == {"attention": 0, "norm": 0, "mlp": 0, "rotary": 0, "residual": 0, "linear": 0}
    assert str(handle.report).startswith("replaced\n  nothing\nskipped\n")
    handle.undo()


def test_nothing_but_near_misses():
    """B44: the error names what came close, so a changed formula upstream is seen at once."""

    class Shifted(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(ValueError, match=r"Left alone: 0 \(norm\): computes none of the RMS norms that we know"):
        patch(nn.Sequential(Shifted(8, eps=1e-5)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model",), TypeError, "patch: model must be a torch.nn.Module, got str"),
        ((None,), TypeError, "patch: model must be a torch.nn.Module, got NoneType"),
    ],
)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        patch(*arguments)


def test_rejects_no_kind():
    with pytest.raises(ValueError, match="at least one of attention, norm, mlp, rotary, linear must be True"):
        patch(tower(), attention=False, norm=False, mlp=False, rotary=False, linear=False)
    with pytest.raises(TypeError, match="attentions"):
        patch(tower(), attentions=True)


def test_continuous_batching_is_there_in_the_release_it_was_written_for():
    """Its own tests are left out where it says that it cannot run, so here nobody asks it."""
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith("5.23."):
        pytest.skip(f"transformers {transformers.__version__}, not 5.23")
    assert continuous.unsupported() is None


def test_module_that_is_the_whole_model():
    norm = nn.RMSNorm(8, eps=1e-5)
    x = torch.randn(2, 8)
    expected = norm(x)
    handle = patch(norm)
    assert handle.report.rows[0].path == "" and repr(handle).startswith("<PatchedModel of RMSNorm: {'attention'")
    torch.testing.assert_close(norm(x), expected)
