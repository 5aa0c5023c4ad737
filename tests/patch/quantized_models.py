"""Small models whose linears are quantised, and modules that use theirs in particular ways."""

import torch
from torch import nn
from torch.nn import functional as F

import fusedops
from fusedops.convert.schemes import SCHEMES
from tests.patch.tiny_models import fill, logits

SKIPPED = ("lm_head", "head")


def quantized(model, scheme="int8", **options):
    """A model with every linear but its head quantised, in place."""
    given = SCHEMES[scheme].options | options
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, nn.Linear) and name not in SKIPPED:
                module._modules[name] = SCHEMES[scheme].module.from_linear(child, **given)
    return model


def counted(model, ids):
    """(logits, {operator: calls})."""
    fusedops.reset_counters()
    out = logits(model, ids)
    return out, {name: number for (name, _), number in fusedops.counters().items()}


class Looker(nn.Module):
    """Attention of one head with projections of its own for q, k and v, k and v narrower than the input."""

    def __init__(self, width=64, narrow=32, bias=True):
        super().__init__()
        self.ask = nn.Linear(width, narrow, bias=bias)
        self.find = nn.Linear(width, narrow, bias=bias)
        self.tell = nn.Linear(width, 2 * narrow, bias=bias)
        self.end = nn.Linear(2 * narrow, width)

    def forward(self, signal):
        return self.end(F.scaled_dot_product_attention(*self.project(signal)))

    def project(self, signal):
        return self.ask(signal), self.find(signal), self.tell(signal)


class EditsBetween(Looker):
    def project(self, signal):
        signal = signal.clone()
        asked = self.ask(signal)
        signal += 1
        return asked, self.find(signal), self.tell(signal)


class Folds(Looker):
    """Looks at a projection in a way that only contiguous memory allows."""

    def project(self, signal):
        asked = self.ask(signal)
        asked = asked.view(asked.shape[0], -1).view(asked.shape)
        return asked, self.find(signal), self.tell(signal)


class Crosses(Looker):
    """Keys and values may come from elsewhere."""

    def forward(self, signal, other=None):
        other = signal if other is None else other
        return self.end(F.scaled_dot_product_attention(self.ask(signal), self.find(other), self.tell(other)))


def looker(scheme="int8", kind=Looker, **options):
    """A quantised Looker in evaluation mode."""
    torch.manual_seed(0)
    return quantized(fill(kind(**options).eval()), scheme)


class Parallel(nn.Module):
    """A layer whose attention and MLP get the same norm's result."""

    def __init__(self, width=64):
        super().__init__()
        self.before = nn.RMSNorm(width, eps=1e-5)
        self.looking = Looker(width)
        self.up = nn.Linear(width, 96)
        self.down = nn.Linear(96, width)

    def forward(self, stream):
        x = self.before(stream)
        return stream + self.looking(x) + self.down(F.relu(self.up(x)))


class Reads(Parallel):
    """Its norm's result also goes where no quantised linear is."""

    def forward(self, stream):
        x = self.before(stream)
        return stream + self.looking(x) + self.down(F.relu(self.up(x))) * x.mean(-1, keepdim=True)


class EditsItsInput(Parallel):
    """Changes the norm's input before somebody reads the norm's result."""

    def forward(self, stream):
        x = self.before(stream)
        stream = stream.mul_(2)
        return stream + self.looking(x) + self.down(F.relu(self.up(x)))
