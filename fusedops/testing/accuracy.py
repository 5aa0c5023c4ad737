"""Compare a kernel's output with a float64 truth, in epsilons of the output's dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_FLOAT32_TINY = torch.finfo(torch.float32).tiny
_IDEAL_MARGIN = 1.05  # a float32 intermediate may turn a near tie the other way than one rounding from float64 does


@dataclass(frozen=True)
class Budget:
    """The largest error that a correct kernel may show, in epsilons of the output's dtype.

    Args:
        rms: Bound of ``|out - truth| / |truth| / eps`` (Euclidean norms over the whole tensor).
        peak: Bound of ``max|out - truth| / max|truth| / eps``.
    """

    rms: float
    peak: float

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> Budget:
        """Return the default budget of an output dtype.

        Args:
            dtype: The output's dtype.

        Returns:
            0.4 and 1.0 for float16 and bfloat16, 32 and 256 for float32, 0 and 0 (equality) for integers and bool.

        Raises:
            TypeError: the dtype has no default (float64, float8): say the budget and why.
        """
        if dtype in (torch.float16, torch.bfloat16):
            return cls(rms=0.4, peak=1.0)
        if dtype == torch.float32:
            return cls(rms=32.0, peak=256.0)
        if not dtype.is_floating_point and not dtype.is_complex:
            return cls(rms=0.0, peak=0.0)
        raise TypeError(f"Budget: {dtype} has no default budget; pass budget=Budget(rms, peak)")


@dataclass(frozen=True)
class Errors:
    """Measured errors, in epsilons of the output's dtype.

    Args:
        rms: ``|out - truth| / |truth| / eps``.
        peak: ``max|out - truth| / max|truth| / eps``.
    """

    rms: float
    peak: float


def errors(out: torch.Tensor, truth: torch.Tensor) -> Errors:
    """Measure the error of an output over the positions where output and truth are finite.

    Args:
        out: The tested output, of any real dtype.
        truth: The same shape in float64 (for integer outputs any dtype).

    Returns:
        The two errors; 0 for an empty tensor, infinity where the truth is all zero and the output is not.

    Raises:
        ValueError: the shapes differ.
        TypeError: the truth of a floating output is not float64, or an argument is no tensor.
    """
    _check_pair(out, truth, "out")
    return _measure(out.detach().double(), truth.detach().to(out.device).double(), _epsilon(out.dtype))


def assert_accurate(
    out: torch.Tensor,
    truth: torch.Tensor,
    *,
    budget: Budget | None = None,
    name: str = "out",
    zeros: bool = True,
) -> Errors:
    """Fail unless an output agrees with the truth, first in class and then within a budget.

    Class: NaN, +inf, -inf and exact zeros stand at the same places. A truth that lies within the budget of the
    overflow threshold may be infinite or not, and one that lies below the smallest number may be zero.
    The budget never asks for more than the truth gives when it is itself rounded once to the output's dtype,
    which matters for a handful of elements and for denormal results.

    Args:
        out: The tested output.
        truth: The same shape in float64, computed from the *same* (already rounded) inputs.
        budget: Default: ``Budget.for_dtype(out.dtype)``.
        name: How the message calls the output.
        zeros: False where terms that are rounded may cancel, so that an exact zero is luck; say why in the test.

    Returns:
        The measured errors.

    Raises:
        AssertionError: class, rms or peak; the message has the numbers and the worst index.
        ValueError: the shapes differ.
        TypeError: a dtype does not fit.
    """
    _check_pair(out, truth, name)
    budget = budget if budget is not None else Budget.for_dtype(out.dtype)
    epsilon = _epsilon(out.dtype)
    actual = out.detach().double()
    expected = truth.detach().to(out.device).double()
    _check_class(actual, expected, out.dtype, budget.peak, name, zeros)

    measured = _measure(actual, expected, epsilon)
    ideal = _measure(expected.to(out.dtype).double(), expected, epsilon)
    limit = Budget(max(budget.rms, ideal.rms * _IDEAL_MARGIN), max(budget.peak, ideal.peak * _IDEAL_MARGIN))
    if not (measured.rms <= limit.rms and measured.peak <= limit.peak):
        finite = torch.isfinite(actual) & torch.isfinite(expected)
        distance = torch.where(finite, (actual - expected).abs(), 0.0)
        worst = _unravel(int(distance.argmax()), distance.shape)
        raise AssertionError(
            f"{name}: rms {measured.rms:.4g} (at most {limit.rms:.4g}), peak {measured.peak:.4g} "
            f"(at most {limit.peak:.4g}) epsilons of {out.dtype}; worst at {worst}: "
            f"got {actual[worst].item():.9g}, truth {expected[worst].item():.9g}"
        )
    return measured


def _check_pair(out: torch.Tensor, truth: torch.Tensor, name: str) -> None:
    for label, value in ((name, out), ("truth", truth)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"assert_accurate: {label} must be a tensor, got {type(value).__name__}")
    if out.shape != truth.shape:
        raise ValueError(f"assert_accurate: {name} has shape {list(out.shape)}, truth {list(truth.shape)}")
    if out.dtype.is_complex or truth.dtype.is_complex:
        raise TypeError("assert_accurate: complex tensors are not supported")
    if out.dtype.is_floating_point and truth.dtype != torch.float64:
        raise TypeError(f"assert_accurate: truth must be float64, got {truth.dtype}")


def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 1.0


def _measure(actual: torch.Tensor, expected: torch.Tensor, epsilon: float) -> Errors:
    finite = torch.isfinite(actual) & torch.isfinite(expected)
    distance = (actual - expected)[finite].abs()
    size = expected[finite].abs()
    if distance.numel() == 0:
        return Errors(0.0, 0.0)
    largest_distance, largest = float(distance.max()), float(size.max())
    if largest_distance == 0.0:
        return Errors(0.0, 0.0)
    if largest == 0.0:
        return Errors(math.inf, math.inf)
    # Scaled by the maximum before squaring, so that neither 3e38 overflows nor a denormal underflows.
    norm = float((size / largest).norm())
    distance_norm = float((distance / largest_distance).norm())
    peak = largest_distance / largest / epsilon
    return Errors(rms=peak * distance_norm / norm, peak=peak)


def _check_class(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, peak: float, name: str, zeros: bool
) -> None:
    """Compare the positions of NaN, the infinities and zero; what is within `peak` epsilons of a threshold is free."""
    epsilon = _epsilon(dtype)
    slack = peak * epsilon
    _same_places(actual.isnan(), expected.isnan(), "NaN", actual, expected, name)
    low, high = (expected * (1.0 - slack)).to(dtype).double(), (expected * (1.0 + slack)).to(dtype).double()
    for infinity in (math.inf, -math.inf):
        undecided = (low == infinity) != (high == infinity)
        wanted = (high == infinity) & ~undecided
        _same_places((actual == infinity) & ~undecided, wanted, f"{infinity:+}", actual, expected, name)
    if zeros:
        smallest = max(torch.finfo(dtype).tiny * epsilon, _FLOAT32_TINY) if dtype.is_floating_point else 0.0
        may_vanish = (expected != 0) & (expected.abs() <= smallest)
        _same_places((actual == 0) & ~may_vanish, expected == 0, "exact zero", actual, expected, name)


def _same_places(
    found: torch.Tensor, wanted: torch.Tensor, kind: str, actual: torch.Tensor, expected: torch.Tensor, name: str
) -> None:
    differs = found != wanted
    if not bool(differs.any()):
        return
    index = _unravel(int(differs.flatten().to(torch.uint8).argmax()), differs.shape)
    raise AssertionError(
        f"{name}: {kind} at {int(found.sum())} places, expected at {int(wanted.sum())}; {int(differs.sum())} differ, "
        f"the first at {index}: got {actual[index].item():.9g}, truth {expected[index].item():.9g}"
    )


def _unravel(position: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        index.append(position % size)
        position //= size
    return tuple(reversed(index))
