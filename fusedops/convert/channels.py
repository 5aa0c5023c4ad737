"""Linears whose output another linear reads through something that keeps channels apart, found by scaling channels.

``down(silu(gate) * up)`` is linear in each channel of up, and attention's output in each channel of v, which is that of
all heads that share it. So is anything else by which a channel's factor comes through unchanged, such as a ReLU. The
output of one linear is scaled by powers of two, whose exponents number its channels; every power that arrives at
another linear, exactly, tells which channel it came from.
"""

import torch

from fusedops.convert.calibrate import hooked, run

_EXPONENTS = {torch.float16: 8}  # float16 has range for so many powers of two; other dtypes for 64


def find_products(model, targets, consumers, observed, batch):
    """The linear that each consumer's input is linear in, channel by channel.

    Args:
        model: The model, in evaluation mode.
        targets: Targets among which to look; only neighbours in the same module are considered.
        consumers: Targets to explain.
        observed: What `calibrate.observe` gave.
        batch: One input of the model.

    Returns:
        {consumer: (producer, channels)}, with the producer's channel for each of the consumer's, -1 where its value
        does not depend on the producer or is (nearly) always 0.
    """
    found, pairs = {}, []
    for parent in {id(c.places[0][0]): c.places[0][0] for c in consumers}.values():
        own = [c for c in consumers if len(c.places) == 1 and c.places[0][0] is parent]
        siblings = [t for t in targets if len(t.places) == 1 and t.places[0][0] is parent]
        if own and len(siblings) > 1:
            pairs.append((_with_kwargs(parent), _explain(parent, own, siblings, observed, found)))
    if pairs:
        with hooked(pairs):
            run(model, batch)
    return found


def _with_kwargs(module):
    return lambda hook: module.register_forward_hook(hook, with_kwargs=True)


def _explain(parent, consumers, siblings, observed, found):
    """A forward hook of the parent that repeats its first call with scaled channels."""
    is_done = False

    def hook(module, args, kwargs, out):
        nonlocal is_done
        if is_done:  # the repeated call of a module that holds itself, or a later one
            return
        is_done = True
        for consumer in consumers:
            earlier = [t for t in siblings if 0 <= observed[t].order < observed[consumer].order and not t.is_tied]
            for producer in sorted(earlier, key=lambda t: -observed[t].order):
                try:
                    channels = _in_ranges(lambda: parent.forward(*args, **kwargs), producer, consumer)
                except Exception:  # code that does not take the same call twice explains nothing
                    return
                if channels is not None:
                    found[consumer] = producer, channels
                    break

    return hook


def _in_ranges(call, producer, consumer):
    """`_channels` of a whole projection, or of the part of a packed one: up of gate and up, v of q, k and v."""
    base = _given(call, consumer)
    if base is None or not base.isfinite().all():
        return None
    N, K = producer.linear.out_features, consumer.linear.in_features
    ranges = [(0, N)]
    if N > K:
        ranges += [(N - K, N), (0, K), (N - (N - K) // 2, N)]
    return next((found for r in ranges if (found := _channels(call, base, producer, consumer, *r)) is not None), None)


def _channels(call, base, producer, consumer, start, stop):
    """The channel of the producer, from start to stop, behind each of the consumer's, or None."""
    size = stop - start
    radix = _EXPONENTS.get(base.dtype, 64)
    number = torch.zeros(producer.linear.out_features, dtype=torch.long, device=base.device)
    number[start:stop] = torch.arange(1, size + 1, device=base.device)  # 0 is an exponent of 0 in all runs
    tiny = torch.finfo(base.dtype).tiny  # what falls below has few bits, and its factor is lost
    largest, at = base.abs().max(0, keepdim=True)
    is_dead = largest[0].float() < tiny * 2.0**radix
    codes, digit = torch.zeros(base.shape[1], dtype=torch.long, device=base.device), 1
    while digit <= size:
        exponents = _spread(number // digit % radix, radix)
        with hooked([(producer.linear.register_forward_hook, _scaling(exponents))]):
            scaled = _given(call, consumer)
        if scaled is None or scaled.shape != base.shape:
            return None
        ratio = (scaled.gather(0, at) / base.gather(0, at))[0].float()
        arrived = torch.where(is_dead, 0.0, torch.log2(ratio))
        whole = arrived.round()
        expected = base * torch.exp2(whole).to(base.dtype)
        if not torch.equal(arrived, whole) or not bool(((scaled - expected).abs() <= tiny).all()):
            return None
        codes += whole.long() % radix * digit
        digit *= radix
    channels = torch.where(is_dead | (codes == 0), -1, start + codes - 1)
    return channels if bool((channels >= 0).any()) and int(codes.max()) <= size else None


def _spread(digits, radix):
    """Digits 0, 1, 2, ... as exponents 0, 1, ..., -1: those of the upper half are negative."""
    return torch.where(digits < radix // 2, digits, digits - radix)


def _scaling(exponents):
    factors = torch.exp2(exponents.float())
    return lambda module, args, out: out * factors.to(out.dtype)


def _given(call, consumer):
    """What the consumer is given in a call, as ``[rows, K]``; None unless it is called exactly once."""
    inputs = []
    with hooked([(consumer.linear.register_forward_pre_hook, lambda module, args: inputs.append(args[0].detach()))]):
        call()
    return inputs[0].flatten(0, -2) if len(inputs) == 1 else None
