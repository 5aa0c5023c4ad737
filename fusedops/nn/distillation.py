"""The loss that lets a model learn from another's predictions, a part of the vocabulary at a time."""

import math

import torch

from fusedops._core import checks

REDUCTIONS = ("batchmean", "mean", "sum", "none")
FLOATS = (*checks.FLOATS, torch.float64)
CHUNK_ELEMENTS = 2**21  # of one part's logits: 8 MiB of float32
MIN_CHUNK = 256  # columns: narrower products are slow, however many tokens there are
OP = "kl_distillation_loss"


def kl_distillation_loss(
    hidden, weight, teacher_hidden, teacher_weight, *, bias=None, teacher_bias=None, labels=None, ignore_index=-100,
    temperature=1.0, reduction="batchmean", chunk=None,
):  # fmt: skip
    """Measure how far a student's predictions are from a teacher's: KL(teacher || student) of each token.

    ``p = softmax((teacher_hidden @ teacher_weight.T + teacher_bias) / temperature)``, q likewise of the student;
    ``loss = sum(p * (log(p) - log(q)))`` over the vocabulary, then reduced over the tokens. The logits are made a part
    of the vocabulary at a time, in the forward and again in the backward pass, and are never stored.

    Args:
        hidden: ``[..., H]``, what goes into the student's output embedding; float16, bfloat16, float32 or float64.
        weight: ``[V, H]``, the student's output embedding; None where `hidden` is the logits ``[..., V]`` already.
        teacher_hidden: ``[..., Ht]``, of the same tokens. The teacher gets no gradient.
        teacher_weight: ``[V, Ht]``, or None as for `weight`.
        bias, teacher_bias: ``[V]``, added to the logits; None beside a weight that is None.
        labels: ``[...]`` integers; a token whose label is `ignore_index` does not count, whatever it holds. None counts
            all tokens.
        ignore_index: See `labels`.
        temperature: Divides both models' logits. The loss is not multiplied by its square: multiply by
            ``temperature**2`` to keep the size of the gradients.
        reduction: ``"batchmean"``, or ``"mean"``, divides the sum by the number of tokens that count, and not by V;
            ``"sum"``; ``"none"`` gives ``[...]``, 0 for tokens that do not count.
        chunk: Columns of the vocabulary that are made at a time; None is what 8 MiB of float32 hold, at least 256.

    Returns:
        float32 (float64 where an argument is), ``[]``, or ``[...]`` without a reduction. 0 where no token counts.

    Raises:
        TypeError: an argument is not of its type or dtype.
        ValueError: a shape or a device does not fit, or a number is out of range.

    Numerics: float32 (float64), whatever autocast says; two 16-bit operands on CUDA are multiplied as they are, with
        sums in float32, and in the backward pass what is sent back is rounded to their dtype. Differences are taken
        between logits less their largest, so a loss near 0 is exact to some epsilons of those differences, not of
        itself, and may be a little below 0. Equal logits give exactly 0.
    Memory: a few buffers ``[tokens, chunk]``, and float32 copies of 16-bit operands, of weights a part at a time; in
        the backward pass also the gradients, that of `hidden` in float32.
    Runs on: any device; a composition of torch's operators.
    From: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    vocabulary = _check(hidden, weight, teacher_hidden, teacher_weight, bias, teacher_bias, labels)
    _check_options(ignore_index, temperature, reduction, chunk)
    shape = hidden.shape[:-1]
    student, teacher = hidden.reshape(-1, hidden.shape[-1]), teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    keep = None
    if labels is not None:
        keep = labels.reshape(-1, 1) != ignore_index
        if weight is not None:  # else it would reach the weight's gradient, be it NaN
            student = student.masked_fill(~keep, 0)
    if chunk is None:
        chunk = max(MIN_CHUNK, CHUNK_ELEMENTS // max(1, student.shape[0]))
    losses = _Loss.apply(
        student, weight, bias, teacher.detach(), teacher_weight, teacher_bias, keep, float(temperature),
        min(chunk, vocabulary),
    )  # fmt: skip
    if reduction == "none":
        return losses.view(shape)
    if reduction == "sum":
        return losses.sum()
    count = losses.new_tensor(losses.shape[0]) if keep is None else keep.sum().to(losses.dtype)
    return losses.sum() / count.clamp_min(1)


class _Loss(torch.autograd.Function):
    """Loss of each token, ``[tokens]``; the backward pass makes the logits anew."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, keep, temperature, chunk):
        tensors = hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias
        folded = None
        with torch.autocast(hidden.device.type, enabled=False):
            for _, s, t in _parts(tensors, temperature, chunk):
                folded = _folded(folded, s, t)
            s_max, s_sum, t_max, t_sum, distance = folded
            losses = distance / t_sum - t_sum.log() + s_sum.log()
            ctx.save_for_backward(*tensors, keep, s_max + s_sum.log(), t_max + t_sum.log())
        ctx.temperature, ctx.chunk = temperature, chunk
        return (losses if keep is None else losses.masked_fill(~keep, 0)).squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *tensors, keep, s_lse, t_lse = ctx.saved_tensors
        hidden, weight, bias = tensors[:3]
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        made = [None] * 9
        if to_hidden:  # a sum over the parts, or the parts beside each other
            made[0] = torch.zeros_like(hidden, dtype=grad.dtype) if weight is not None else torch.empty_like(hidden)
        made[1:3] = (torch.empty_like(x) if need else None for x, need in ((weight, to_weight), (bias, to_bias)))
        with torch.autocast(hidden.device.type, enabled=False):
            for part, s, t in _parts(tensors, ctx.temperature, ctx.chunk):
                sent = s.sub_(s_lse).exp_().sub_(t.sub_(t_lse).exp_()).mul_(grad[:, None] / ctx.temperature)
                if keep is not None:
                    sent.masked_fill_(~keep, 0)
                if to_bias:
                    made[2][part] = sent.sum(0)
                if weight is None:
                    made[0][:, part] = sent
                    continue
                sent = sent.to(hidden.dtype) if _is_narrow(hidden, weight) else sent
                if to_hidden:
                    made[0] += _product(sent, weight[part])
                if to_weight:
                    made[1][part] = _product(sent.T, hidden)
        made[0] = made[0].to(hidden.dtype) if to_hidden else None
        return tuple(made)


def _parts(tensors, temperature, chunk):
    """(slice of the vocabulary, student's logits, teacher's) of one part after the other; both may be changed."""
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = tensors
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32
    vocabulary = hidden.shape[1] if weight is None else weight.shape[0]
    for start in range(0, vocabulary, chunk):
        part = slice(start, min(start + chunk, vocabulary))
        s = _logits(hidden, weight, bias, part, dtype).div_(temperature)
        yield part, s, _logits(teacher_hidden, teacher_weight, teacher_bias, part, dtype).div_(temperature)


def _logits(hidden, weight, bias, part, dtype):
    """Logits of one part of the vocabulary, in memory of their own."""
    if weight is None:
        return hidden[:, part].to(dtype, copy=True)
    logits = _product(hidden, weight[part].T).to(dtype)
    return logits if bias is None else logits.add_(bias[part])


def _folded(before, s, t):
    """Sums over the vocabulary up to and with this part, ``[tokens, 1]`` each.

    Returns:
        (largest s, sum of ``exp(s - largest s)``, largest t, sum of ``exp(t - largest t)``, sum of
        ``exp(t - largest t) * ((t - largest t) - (s - largest s))``)
    """
    s_max, t_max = s.amax(1, keepdim=True), t.amax(1, keepdim=True)
    if before is not None:
        s_max, t_max = torch.maximum(s_max, before[0]), torch.maximum(t_max, before[2])
    s, t = s.sub_(s_max), t.sub_(t_max)
    share = t.exp()
    distance = torch.where(share > 0, share * (t - s), 0).sum(1, keepdim=True)  # -inf has the share 0
    s_sum, t_sum = s.exp().sum(1, keepdim=True), share.sum(1, keepdim=True)
    if before is not None:
        s_moved, t_moved = before[0] - s_max, before[2] - t_max
        scale = t_moved.exp()
        s_sum += before[1] * s_moved.exp()
        t_sum += before[3] * scale
        distance += scale * (before[4] + before[3] * (t_moved - s_moved))
    return s_max, s_sum, t_max, t_sum, distance


def _is_narrow(a, b):
    """Whether two operands are multiplied as they are, in 16 bits with sums in float32."""
    return a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16)


def _product(a, b):
    """a @ b in float32, or float64 where one of them is."""
    if _is_narrow(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype) @ b.to(dtype)


def _check(hidden, weight, teacher_hidden, teacher_weight, bias, teacher_bias, labels):
    """Check the tensors; the size of the vocabulary."""
    wide, teacher_wide = "V" if weight is None else "H", "V" if teacher_weight is None else "Ht"
    sizes = checks.bind_shapes(
        OP, hidden=(hidden, f"... {wide}"), weight=(weight, "V H?"),
        teacher_hidden=(teacher_hidden, f"... {teacher_wide}"), teacher_weight=(teacher_weight, "V Ht?"),
        bias=(bias, "V?"), teacher_bias=(teacher_bias, "V?"), labels=(labels, "...?"),
    )  # fmt: skip
    named = {
        "hidden": hidden, "weight": weight, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight,
        "bias": bias, "teacher_bias": teacher_bias,
    }  # fmt: skip
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            got = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"{OP}: {name} must be float16, bfloat16, float32 or float64, got {got}")
    for name, of, added in (("bias", weight, bias), ("teacher_bias", teacher_weight, teacher_bias)):
        if of is None and added is not None:
            raise ValueError(f"{OP}: {name} must be None beside logits, got a tensor")
    if labels is not None and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise TypeError(f"{OP}: labels must be integers, got {str(labels.dtype).removeprefix('torch.')}")
    if sizes["V"] == 0:
        raise ValueError(f"{OP}: the vocabulary must have at least one entry, got V=0")
    return sizes["V"]


def _check_options(ignore_index, temperature, reduction, chunk):
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{OP}: ignore_index must be an integer, got {type(ignore_index).__name__}")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"{OP}: temperature must be a number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{OP}: temperature must be finite and above 0, got {temperature}")
    checks.check_choice(OP, "reduction", reduction, REDUCTIONS)
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int)):
        raise TypeError(f"{OP}: chunk must be None or an integer, got {type(chunk).__name__}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{OP}: chunk must be at least 1, got {chunk}")
