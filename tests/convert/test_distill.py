"""distill_: a masked model learns what its teacher predicts, and keeps its mask."""

import copy

import pytest
import torch
from torch import nn

import fusedops
from fusedops.convert import distill
from fusedops.nn import Masked24Linear
from fusedops.nn.distillation import kl_distillation_loss
from tests.ops.common import assert_rejected
from tests.patch.tiny_models import tiny

pytest.importorskip("transformers", reason="transformers is not installed")


def batches(number=12, seed=0, length=16):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 96, (number, 2, length), generator=generator))


@pytest.fixture
def models():
    """A model whose MLPs are masked, its handle, and the model that it was."""
    model = tiny("llama")
    teacher = copy.deepcopy(model)
    return model, fusedops.sparsify_(model, layers=("mlp",), train=True, keep=True), teacher


def distance(model, teacher, ids):
    with torch.no_grad():
        return kl_distillation_loss(model(ids).logits, None, teacher(ids).logits, None).item()


def test_the_model_comes_nearer_and_the_mask_stays(models):
    model, handle, teacher = models
    other = batches(1, seed=9)[0]
    masked = [module for module in model.modules() if isinstance(module, Masked24Linear)]
    before = distance(model, teacher, other)
    untouched = {name: p.clone() for name, p in model.named_parameters() if ".mlp." not in name}
    taught = {name: p.clone() for name, p in teacher.named_parameters()}
    seen = []
    losses = fusedops.distill_(model, teacher, batches() * 4, learning_rate=3e-3, progress=lambda *at: seen.append(at))
    assert seen == [(done, 48) for done in range(1, 49)] and len(losses) == 48
    assert distance(model, teacher, other) < 0.9 * before  # of tokens drawn by chance there is little to learn
    assert distance(model, teacher, batches(1)[0]) < 0.5 * losses[0]
    assert len(masked) == 6 and all(not module.weight[~module.mask].any() for module in masked)
    for one, kept in ((model, untouched), (teacher, taught)):
        now = dict(one.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in kept.items())
        assert all(p.requires_grad and p.grad is None for p in one.parameters())
    tuned = model(other).logits
    handle.convert()
    assert any(isinstance(module, fusedops.nn.Sparse24Linear) for module in model.modules())
    torch.testing.assert_close(model(other).logits, tuned, rtol=1e-4, atol=1e-4)


def test_each_step_is_adamw_on_the_loss(models, monkeypatch):
    """By hand: the loss from stored logits, the cut gradient, the rate of the schedule."""
    model, _, teacher = models
    monkeypatch.setattr(distill, "LARGEST_NORM", 0.02)  # below those of this model
    ours, start = copy.deepcopy(model), copy.deepcopy(model)
    weights = [module.weight for module in ours.modules() if isinstance(module, Masked24Linear)]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    wanted = []
    for ids, rate in zip(batches(4), (1.0, 0.8535534, 0.5, 0.1464466), strict=True):
        logits, right = ours(ids).logits, teacher(ids).logits.detach()
        loss = nn.functional.kl_div(logits.log_softmax(-1).flatten(0, 1), right.softmax(-1).flatten(0, 1),
                                    reduction="batchmean")  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        assert nn.utils.clip_grad_norm_(weights, 0.02) > 0.021
        optimizer.param_groups[0]["lr"] = 0.01 * rate
        optimizer.step()
        wanted.append(loss.item())
    found = fusedops.distill_(model, teacher, batches(4), learning_rate=0.01)
    assert found == pytest.approx(wanted, rel=1e-3)
    moved, off = (
        sum(float((a - b).detach().norm() ** 2) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        ** 0.5
        for other in (start, ours)
    )
    assert off < 0.02 * moved, off / moved


def test_the_rate_rises_and_falls():
    rates = [distill._rate(step, 40) for step in range(40)]
    assert rates[0] == pytest.approx(0.25) and max(rates) == rates[3] and 0 < rates[-1] < 0.01
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_logits_are_not_made_where_the_output_embedding_ends_the_model(models, monkeypatch):
    model, _, teacher = models
    widths, right = [], distill.kl_distillation_loss

    def watched(hidden, weight, *others, **options):
        widths.append((hidden.shape[-1], weight is None, options["labels"] is None))
        return right(hidden, weight, *others, **options)

    monkeypatch.setattr(distill, "kl_distillation_loss", watched)
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    first = fusedops.distill_(model, teacher, batches(1))
    assert "forward" not in vars(model.lm_head)
    model.lm_head.register_forward_hook(lambda module, args, out: out.tanh())  # what softcapping does behind it
    fusedops.distill_(model, teacher, batches(1))
    ids = batches(1)[0]
    mask = torch.ones_like(ids)
    mask[:, -4:] = 0
    short = fusedops.distill_(model, teacher, [{"input_ids": ids, "attention_mask": mask}])
    assert widths == [(hidden, False, True), (vocabulary, True, True), (vocabulary, True, False)]
    assert first and short


def test_what_does_not_count_is_told_by_the_mask(models):
    model, _, teacher = models
    ids = batches(1)[0]
    mask = torch.ones_like(ids)
    mask[:, -4:] = 0
    other = ids.clone()
    other[:, -4:] = 7
    found = [
        fusedops.distill_(copy.deepcopy(model), teacher, [{"input_ids": one, "attention_mask": mask}])
        for one in (ids, other)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert fusedops.distill_(model, teacher, [{"input_ids": other}]) != pytest.approx(found[0], rel=1e-3)


def test_a_failure_leaves_what_must_not_change(models):
    model, _, teacher = models
    model.lm_head.weight.requires_grad_(False)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fusedops.distill_(model, teacher, batches(2), progress=stop)
    assert not model.lm_head.weight.requires_grad and "forward" not in vars(model.lm_head)
    assert next(model.model.layers.parameters()).requires_grad
    with torch.no_grad():
        teacher.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="distill_: the loss must stay finite, got nan"):
        fusedops.distill_(model, teacher, batches(2))


def test_rejects(models):
    model, handle, teacher = models
    stray = nn.Parameter(torch.zeros(3))
    for arguments, options, error, message in (
        (("a", teacher, batches(1)), {}, TypeError, "model must be a torch.nn.Module, got str"),
        ((model, None, batches(1)), {}, TypeError, "teacher must be a torch.nn.Module, got NoneType"),
        ((model, teacher, []), {}, ValueError, "batches must hold at least one batch, got none"),
        ((model, model, batches(1)), {}, ValueError, "teacher must have weights of its own"),
        ((teacher, model, batches(1)), {}, ValueError, "model must hold layers in training"),
        ((model, teacher, batches(1)), {"parameters": [stray]}, ValueError, "parameters must be of the model"),
        ((model, teacher, batches(1)), {"learning_rate": 0}, ValueError, "learning_rate must be finite and above 0"),
        ((model, teacher, batches(1)), {"temperature": "1"}, TypeError, "temperature must be a number, got str"),
        ((model, teacher, batches(1)), {"progress": 3}, TypeError, "progress must be callable, got int"),
    ):
        fusedops.reset_counters()
        assert_rejected(lambda a=arguments, o=options: fusedops.distill_(*a, **o), error, "distill_: .*" + message)
    handle.undo()
