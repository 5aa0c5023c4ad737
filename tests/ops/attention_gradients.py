"""What the tests of attention's gradients share: the truth, what a kernel may lose, and the comparison."""

from dataclasses import dataclass

import torch

from fusedops._core.register import operators
from fusedops.ops.attention import reference
from fusedops.ops.attention._options import four_dims
from fusedops.testing import assert_accurate, make_tensor
from tests.ops.attention_problems import TABLES, Problem
from tests.ops.common import counted_budget, gradients

NAMES = ("dq", "dk", "dv", "dsinks")
TERMS = 4  # roundings of float32 in a row: products, their sum with delta, the weight, the factor of a score


@dataclass
class Gradients:
    """A problem with gradients of out and, unless None, of lse."""

    problem: Problem
    grad_out: torch.Tensor
    grad_lse: torch.Tensor | None

    @classmethod
    def draw(cls, problem, seed=0, through_lse=True, layout="contiguous"):
        out, lse = problem.truth()
        grad_out = make_tensor(out.shape, problem.q.dtype, seed=seed, layout=layout)
        return cls(problem, grad_out, make_tensor(lse.shape, torch.float32, seed=seed + 1) if through_lse else None)

    def run(self):
        """Gradients of q, k, v and sinks by the public function."""
        problem = self.problem

        def function(q, k, v, sinks):
            outputs = Problem(q, k, v, {**problem.options, "sinks": sinks}, problem.lengths).run()
            return outputs if self.grad_lse is not None else outputs[0]

        grads = (self.grad_out,) if self.grad_lse is None else (self.grad_out, self.grad_lse)
        return gradients(function, (problem.q, problem.k, problem.v, problem.options.get("sinks")), grads)

    def run_backward(self):
        """The same of a dense problem by the backward operator alone, from the true out and lse, each rounded once."""
        out, lse = self.problem.truth()
        q, k, v, *rest = self.problem.positional()
        rest[TABLES.index("mask")] = four_dims(rest[TABLES.index("mask")])
        forward = out.to(q.dtype), lse.float()
        found = operators()["attention_backward"](self.grad_out, self.grad_lse, q, k, v, *forward, *rest)
        return [*found[:3], None if self.problem.options.get("sinks") is None else found[3]]

    def truth(self):
        """The same in float64, by differentiating the reference."""
        found = self._reference_backward()(
            *(None if t is None else t.double() for t in (self.grad_out, self.grad_lse)), *self._positional()
        )
        return [*found[:3], None if self.problem.options.get("sinks") is None else found[3]]

    def check(self, found):
        """Compare with the truth: float32 with the budget, 16 bits with what a kernel must round."""
        modelled, lost = self._model()
        for name, result, wanted, model, loss in zip(NAMES, found, self.truth(), modelled, lost, strict=True):
            if wanted is None:
                assert result is None, name
            elif self.problem.q.dtype == torch.float32:
                _check_float32(name, result, wanted, loss)
            else:
                _check_rounded(name, result, wanted, model, loss)

    def _reference_backward(self):
        return reference.attention_varlen_backward if self.problem.lengths else reference.attention_backward

    def _positional(self):
        q, k, v, *rest = self.problem.positional(torch.Tensor.double)
        return q, k, v, *self.problem.truth(), *rest

    def _model(self):
        """Gradients with a kernel's own roundings, and what float32 may lose of each: dense problems alone.

        The weights are the output of attention with the identity as values. The kernel rounds them and the gradients
        of the scores to the dtype, sums in wide, and rounds once; out was rounded before.
        """
        q, k, v, *rest = (t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
                          for t in self.problem.positional())  # fmt: skip
        dtype, scale, softcap, group = self.problem.q.dtype, rest[-5], rest[-1], q.shape[2] // k.shape[2]
        out, lse = self.problem.truth()
        grad_out = self.grad_out.double().transpose(1, 2)
        grad_lse = torch.zeros_like(lse) if self.grad_lse is None else self.grad_lse.double()
        grad_lse = grad_lse.masked_fill(lse.isneginf(), 0.0)
        heads = [t.transpose(1, 2).repeat_interleave(n, 1) for t, n in ((q, 1), (k, group), (v, group))]
        eye = torch.eye(k.shape[1], dtype=torch.float64).expand(k.shape[0], k.shape[2], -1, -1).transpose(1, 2)
        weights = reference.attention(q, k, eye, *rest)[0].transpose(1, 2)
        delta = (grad_out * out.to(dtype).double().transpose(1, 2)).sum(-1) - grad_lse
        slope = torch.ones_like(weights)
        products = heads[0] @ heads[1].mT * scale
        if softcap:
            slope = slope * (1.0 - torch.tanh(products / softcap) ** 2)
        ds = weights * (grad_out @ heads[2].mT - delta[..., None]) * slope
        rounded, narrow = weights.to(dtype).double(), ds.to(dtype).double()
        model = [narrow @ heads[1] * scale, narrow.mT @ heads[0] * scale, rounded.mT @ grad_out]

        size = grad_out.abs() @ heads[2].abs().mT + (grad_out * out.transpose(1, 2)).abs().sum(-1)[..., None]
        size = (
            TERMS * (size + grad_lse.abs()[..., None])
            + (1.0 + products.abs() + lse.abs()[..., None]) * (grad_out @ heads[2].mT - delta[..., None]).abs()
        )
        off = (weights * size * slope).nan_to_num(0.0, 0.0, 0.0)
        off_weights = (weights * (TERMS + products.abs() + lse.abs()[..., None])).nan_to_num(0.0, 0.0, 0.0)
        lost = [
            off @ heads[1].abs() * abs(scale),
            off.mT @ heads[0].abs() * abs(scale),
            off_weights.mT @ grad_out.abs(),
        ]
        sinks = self.problem.options.get("sinks")
        terms = [] if sinks is None else self._sink_terms(sinks.double(), lse, delta, grad_out, out)
        return self._joined(model, group, terms[:1]), self._joined(lost, group, terms[1:], torch.float32)

    def _sink_terms(self, sinks, lse, delta, grad_out, out):
        shares = torch.exp(sinks[:, None] - lse.masked_fill(lse.isneginf(), float("inf")))
        size = TERMS * ((grad_out * out.transpose(1, 2)).abs().sum(-1) + delta.abs())
        return -(shares * delta).sum((0, 2)), (shares * (size + (lse.abs() + 1.0) * delta.abs())).sum((0, 2))

    def _joined(self, parts, group, terms, epsilon_of=None):
        """Heads of a group summed, laid out as q, k and v are, in the dtype or times float32's epsilon."""
        dq, dk, dv = parts
        dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))
        results = [*(t.transpose(1, 2) for t in (dq, dk, dv)), *terms]
        if epsilon_of is not None:
            results = [t * torch.finfo(epsilon_of).eps for t in results]
        else:
            dtypes = [self.problem.q.dtype] * 3 + ([self.problem.options["sinks"].dtype] if terms else [])
            results = [t.to(dtype).double() for t, dtype in zip(results, dtypes, strict=True)]
        return results if terms else [*results, None]


def _check_float32(name, result, wanted, loss):
    if wanted.any():
        assert_accurate(result, wanted, budget=counted_budget(result.dtype, loss, wanted), name=name, zeros=False)
    else:  # nothing to be relative to, as where each query sees one key
        assert bool((result.double().abs() <= loss).all()), f"{name} must be 0, got {result.abs().max()}"


def _check_rounded(name, result, wanted, model, loss):
    """``max|K - R| <= 2 max|M - R| + 1 ulp``, by Euclidean norm too, and what float32 may lose."""
    epsilon = torch.finfo(result.dtype).eps
    assert torch.equal(result.isfinite(), wanted.to(result.dtype).isfinite()), f"{name} is not finite where it should"
    for norm in (float("inf"), 2):
        found, allowed, ulp, lost = (
            float(torch.linalg.vector_norm(t, norm)) if t.numel() else 0.0
            for t in (result.double() - wanted, model - wanted, wanted * epsilon, loss)
        )
        assert found <= 2 * allowed + ulp + lost, (
            f"{name}: off by {found:.3g}, the model by {allowed:.3g} (norm {norm})"
        )
