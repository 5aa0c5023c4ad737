"""Norms whose output can be scaled through their parameters, told by what they compute."""

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import nn

_SIZES = (0.5, 2.0, 4.0)  # factors of the probes


@dataclass(eq=False)
class Norm:
    """A norm whose output is proportional to ``weight + offset`` in each channel, and takes its bias as it is.

    Attributes:
        path: Name in the model.
        module: The norm.
        weight, bias: Names of its parameters; bias is None where it has none.
        offset: 0.0, or 1.0 of Gemma.
    """

    path: str
    module: nn.Module
    weight: str
    bias: str | None
    offset: float

    @property
    def size(self):
        """Number of channels."""
        return self.module._parameters[self.weight].numel()

    def divide(self, factors):
        """Divide the output of each channel by a factor, in place, and return what it was really divided by.

        The weight is rounded to its dtype; the factor that is returned, in float32, is the one that the rounded weight
        stands for, so that a linear which takes it up computes what it did. A weight of 0 stays, with the factor 1.
        """
        parameter = self.module._parameters[self.weight]
        factors = factors.to(parameter.device)
        before = parameter.detach().float() + self.offset
        after = (before / factors - self.offset).to(parameter.dtype)
        real = before / (after.float() + self.offset)
        usable = real.isfinite() & (real > 0)
        with torch.no_grad():
            parameter.copy_(torch.where(usable, after, parameter))
            real = torch.where(usable, real, 1.0)
            if self.bias is not None:
                bias = self.module._parameters[self.bias]
                bias.copy_((bias.float() / real).to(bias.dtype))
        return real

    def parameters(self):
        """The parameters that `divide` changes."""
        return [self.module._parameters[name] for name in (self.weight, self.bias) if name is not None]


def find_norms(model):
    """Every Norm of a model, as [(path, module, Norm)]."""
    found = []
    for path, module in model.named_modules():
        parameters = {name: value for name, value in module._parameters.items() if value is not None}
        if module._modules or not 1 <= len(parameters) <= 2:
            continue
        shapes = {tuple(value.shape) for value in parameters.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1 or any(p.is_meta for p in parameters.values()):
            continue
        reading = _read(module, parameters)
        if reading is not None:
            found.append(Norm(path, module, *reading))
    return found


def _read(module, parameters):
    """(weight, bias, offset) of a module that behaves as a norm, or None."""
    for weight, *rest in permutations(parameters):
        for offset in (0.0, 1.0):
            bias = rest[0] if rest else None
            if _scales(module, parameters, weight, bias, offset):
                return weight, bias, offset
    return None


def _scales(module, parameters, weight, bias, offset):
    """Whether scaling weight + offset and the bias scales the output, channel by channel."""
    like = parameters[weight]
    seeded = torch.Generator("cpu").manual_seed(0)
    size = like.numel()
    x, gain, shift = (torch.randn(shape, generator=seeded) for shape in ((2, 3, size), (size,), (size,)))
    factors = torch.tensor(_SIZES)[torch.randint(len(_SIZES), (size,), generator=seeded)]
    gain = gain.abs() + 0.5
    outs = []
    for by in (torch.ones(size), factors):
        given = {weight: gain * by - offset} | ({} if bias is None else {bias: shift * by})
        given = {name: nn.Parameter(value.to(like.device), requires_grad=False) for name, value in given.items()}
        outs.append(_attempt(module, given, x.to(like.device)))
    if any(not isinstance(out, torch.Tensor) or out.shape != x.shape for out in outs):
        return False
    expected = outs[0].float() * factors.to(like.device)
    return torch.allclose(outs[1].float(), expected, rtol=1e-5, atol=1e-6) and bool(expected.any())


def _attempt(module, parameters, x):
    """The module's output on a probe, or None: code that does not take it is no norm."""
    try:
        return torch.func.functional_call(module, parameters, (x,))
    except Exception:
        return None
