"""Training a pruned or quantised model to predict what the model that it was made from predicts."""

import math

import torch
from torch import nn

from fusedops._core.modules import foreign_attribute
from fusedops.convert.calibrate import checked_batches, run
from fusedops.nn import FakeQuantizedLinear, Masked24Linear
from fusedops.nn.distillation import kl_distillation_loss

OP = "distill_"
WARM_UP = 0.1  # of the steps, in which the learning rate rises
LARGEST_NORM = 1.0  # of a step's gradient
BETAS = (0.9, 0.95)


def distill_(model, teacher, batches, *, learning_rate=1e-3, temperature=1.0, parameters=None, progress=None):
    """Train a model, one step for each batch, until it predicts what its teacher does.

    What one-shot pruning or rounding costs a small model is won back in large part by few steps: of
    ``sparsify_(model, train=True)`` or ``fake_quantize_(model, ...)`` before, and `.convert()` after. The loss is
    `fusedops.nn.functional.kl_distillation_loss`; where a model's logits are the product of its output embedding and
    its input, which is found by running it, they are never stored. The optimizer is AdamW without weight decay, whose
    rate rises over the first tenth of the steps and falls to 0 along a cosine; gradients are cut to the norm 1.

    Args:
        model: The model, which runs in the mode that it is in. Dropped weights of `fusedops.nn.Masked24Linear` stay 0.
        teacher: What it shall predict: a model of the same vocabulary with weights of its own, such as a
            ``copy.deepcopy`` from before.
        batches: Model inputs as for `sparsify_`, one for each step; a mapping's ``attention_mask`` tells what counts.
        learning_rate: The largest; 0.001 is of 2:4 sparsity by Wanda.
        temperature: Of the loss.
        parameters: What is trained; None is the weights of all `Masked24Linear` and `FakeQuantizedLinear`.
        progress: Is called with (done, total) after each step.

    Returns:
        The loss of each step, as a list of numbers.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: there is nothing to train or no batch, the teacher's weights are the model's, or a number is out of
            range.
        RuntimeError: the loss is no longer finite. Earlier steps stay.

    From: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    batches = checked_batches(OP, batches, "batches")
    _check_numbers(learning_rate, temperature, progress)
    trained = _trained(model, teacher, parameters)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(batches)))
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gradients = [(parameter, parameter.grad) for parameter in trained]
    losses = []
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        student, master = _Predictions(model, batches[0]), _Predictions(teacher, batches[0])
        for batch in batches:
            optimizer.zero_grad()
            losses.append(_step(student, master, batch, temperature, trained))
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(len(losses), len(batches))
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return losses


def _step(student, master, batch, temperature, trained):
    """Leave the gradients of one batch, cut to their largest norm; the loss."""
    with torch.no_grad():
        to_learn, teacher_weight, teacher_bias = master(batch)
    hidden, weight, bias = student(batch)
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    labels = None if mask is None else torch.where(mask.to(hidden.device) != 0, 0, -100)
    loss = kl_distillation_loss(
        hidden, weight, to_learn, teacher_weight, bias=bias, teacher_bias=teacher_bias, labels=labels,
        temperature=temperature,
    )  # fmt: skip
    found = loss.item()
    if not math.isfinite(found):
        raise RuntimeError(f"{OP}: the loss must stay finite, got {found}; a smaller learning_rate may help")
    loss.backward()
    nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
    return found


def _rate(step, steps):
    """The share of the learning rate that a step gets."""
    return min(1.0, (step + 1) / max(1, round(WARM_UP * steps))) * 0.5 * (1 + math.cos(math.pi * step / steps))


class _Predictions:
    """A model's predictions as operands of the loss: what goes into its output embedding and that, or logits.

    The first where a product of the two is, bit for bit, what the model gives for a batch: nothing stands behind it.
    """

    def __init__(self, model, batch):
        self._model = model
        self._head = None
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if type(head) is not nn.Linear or foreign_attribute(head) is not None:
            return
        with torch.no_grad():
            logits = _logits(run(model, batch))
            self._head = head
            hidden, weight, bias = self(batch)
            shape = (*logits.shape[:-1], head.in_features)
            if hidden.shape != shape or not torch.equal(nn.functional.linear(hidden, weight, bias), logits):
                self._head = None

    def __call__(self, batch):
        """(hidden or logits, weight or None, bias or None)"""
        head = self._head
        if head is None:
            return _logits(run(self._model, batch)), None, None
        head.forward = lambda hidden: hidden
        try:
            return _logits(run(self._model, batch)), head.weight, head.bias
        finally:
            del head.forward


def _logits(out):
    return out if isinstance(out, torch.Tensor) else out.logits


def _trained(model, teacher, parameters):
    """The parameters to train, each once."""
    for name, one in (("model", model), ("teacher", teacher)):
        if not isinstance(one, nn.Module):
            raise TypeError(f"{OP}: {name} must be a torch.nn.Module, got {type(one).__name__}")
    if parameters is None:
        layers = (m for m in model.modules() if isinstance(m, Masked24Linear | FakeQuantizedLinear))
        parameters = [layer.weight for layer in layers]
    found = list({id(parameter): parameter for parameter in parameters}.values())
    own, foreign = ({id(p) for p in one.parameters()} for one in (model, teacher))
    if not found:
        raise ValueError(f"{OP}: model must hold layers in training (sparsify_ with train=True), or give parameters")
    for parameter in found:
        if id(parameter) not in own:
            raise ValueError(f"{OP}: parameters must be of the model, got another {type(parameter).__name__}")
        if id(parameter) in foreign:
            raise ValueError(f"{OP}: teacher must have weights of its own, got one that is trained")
    return found


def _check_numbers(learning_rate, temperature, progress):
    for name, value in (("learning_rate", learning_rate), ("temperature", temperature)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{OP}: {name} must be a number, got {type(value).__name__}")
        if not 0 < value < math.inf:
            raise ValueError(f"{OP}: {name} must be finite and above 0, got {value}")
    if progress is not None and not callable(progress):
        raise TypeError(f"{OP}: progress must be callable, got {type(progress).__name__}")
