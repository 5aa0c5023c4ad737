"""What tensor parallelism is told of quantised layers; that it computes the same is tested with two processes."""

import sys
from types import SimpleNamespace

import pytest

from fusedops.patch.quantizer_parallel import add_scales_to_plan, check_distributed, fit_local_shards
from tests.patch.quantized_checkpoints import load, save_tiny

pytest.importorskip("transformers.distributed.parallel_utils")

DOWN, UP = "model.layers.*.mlp.down_proj", "model.layers.*.mlp.up_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{scheme: model}, one with a scale for each row, one with scales of groups."""
    folder = save_tiny(tmp_path_factory.mktemp("floats"))
    return {scheme: load(folder, scheme) for scheme in ("int8", "int4-weight-only")}


def distributed(**options):
    return SimpleNamespace(**{"tp_plan": None, "dp_size": 1, **options})


def test_scales_follow_their_weights(models):
    """Scales of rows stay whole where columns are split; those of groups, and all where rows are, are split too."""
    given = {DOWN: "rowwise", UP: "colwise", "model.embed_tokens": "embedding_rowwise"}
    plan = dict(given)
    add_scales_to_plan(models["int8"], plan)
    assert plan == {**given, f"{DOWN}.weight_scale": "replicate"}
    plan = dict(given)
    add_scales_to_plan(models["int4-weight-only"], plan)
    assert plan == given
    assert models["int8"].tp_plan[f"{DOWN}.weight_scale"] == "replicate"  # as transformers asked for when it loaded


def test_a_plan_that_is_asked_for(models, monkeypatch):
    monkeypatch.setattr(
        models["int8"].config, "distributed_config", distributed(tp_plan={UP: "rowwise_rep"}), raising=False
    )
    plan = {UP: "colwise"}
    add_scales_to_plan(models["int8"], plan)
    assert plan == {UP: "colwise", f"{UP}.weight_scale": "replicate"}


def test_what_is_refused(models, monkeypatch):
    model = models["int8"]
    check_distributed(model, pre_quantized=False)
    add_scales_to_plan(model, {UP: "packed_colwise"})  # a plan that nobody carries out
    monkeypatch.setattr(model.config, "distributed_config", distributed(), raising=False)
    check_distributed(model, pre_quantized=True)
    with pytest.raises(NotImplementedError, match="must come from a checkpoint that is quantised already"):
        check_distributed(model, pre_quantized=False)
    with pytest.raises(
        NotImplementedError, match="must be colwise or rowwise, got packed_colwise for model.layers.0.mlp"
    ):
        add_scales_to_plan(model, {UP: "packed_colwise"})
    monkeypatch.setattr(model.config, "distributed_config", distributed(dp_size=2))
    with pytest.raises(NotImplementedError, match="must not be split by FSDP"):
        check_distributed(model, pre_quantized=True)


def test_a_transformers_that_does_not_ask(models, monkeypatch):
    """Scales that were split with the columns of their weights would be those of other rows."""
    model = models["int8"]
    monkeypatch.setattr(model, "_tp_size", 2)
    fit_local_shards(model)
    monkeypatch.setitem(sys.modules, "transformers.distributed.parallel_utils", None)
    with pytest.raises(NotImplementedError, match="needs a newer transformers"):
        fit_local_shards(model)
