"""Planted faults: prove that a test would have caught a wrong kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Outputs = torch.Tensor | tuple


@dataclass(frozen=True)
class Fault:
    """A wrong implementation with a name.

    Args:
        name: What is wrong, as the report of survivors prints it.
        wrong: A callable with the signature of the correct implementation.
    """

    name: str
    wrong: Callable


def assert_faults_rejected(
    check: Callable[[Callable], object], correct: Callable, faults: Sequence[Fault], minimum: int = 15
) -> None:
    """Fail unless a check accepts the correct implementation and rejects every fault.

    Args:
        check: Called with an implementation; raises AssertionError if it is wrong. It must be deterministic.
        correct: The correct implementation.
        faults: The wrong ones.
        minimum: The least number of faults.

    Raises:
        AssertionError: `correct` is rejected, or faults survive (their names are listed).
        RuntimeError: a fault raised something else, so it says nothing about the check.
        ValueError: fewer than `minimum` faults, or two of the same name.
    """
    names = [fault.name for fault in faults]
    if len(names) < minimum:
        raise ValueError(f"assert_faults_rejected: faults must be at least {minimum}, got {len(names)}")
    if len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"assert_faults_rejected: fault names must differ, got twice: {', '.join(repeated)}")
    try:
        check(correct)
    except AssertionError as error:
        raise AssertionError(f"the check rejects the correct implementation: {error}") from error
    survivors = [fault.name for fault in faults if not _is_rejected(check, fault)]
    if survivors:
        raise AssertionError(f"{len(survivors)} of {len(faults)} planted faults survive: {'; '.join(survivors)}")


def standard_faults(correct: Callable, *, output: int | None = None) -> list[Fault]:
    """Make the usual wrong versions of a function that returns floating tensors ``[..., N]``.

    Check them with inputs of at least 3 different rows and an N that is larger than 16 and no multiple of 16,
    so that every fault really changes the result.

    Args:
        correct: A function that returns a tensor or a tuple of tensors.
        output: Which element of the tuple to damage; None damages each tensor.

    Returns:
        The faults, more than the 15 that ``assert_faults_rejected`` asks for.
    """
    return [Fault(name, _damaged(correct, damage, output)) for name, damage in _DAMAGES.items()]


def argument_faults(correct: Callable, position: int, name: str) -> list[Fault]:
    """Make wrong versions that misuse one tensor argument: ignored, negated, shifted, only its first element, +1%.

    Args:
        correct: The correct implementation; it must be called with the argument at that position.
        position: The position of the argument.
        name: What the argument is called in the fault's name.

    Returns:
        Six faults.
    """

    def replaced(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
        def wrong(*args, **kwargs):
            changed = list(args)
            changed[position] = change(args[position])
            return correct(*changed, **kwargs)

        return wrong

    changes = {
        "taken as ones": torch.ones_like,
        "taken as zeros": torch.zeros_like,
        "negated": torch.neg,
        "shifted by one": lambda tensor: tensor.roll(1, -1),
        "only its first element": lambda tensor: tensor[..., :1].expand_as(tensor).contiguous(),
        "scaled +1%": lambda tensor: (tensor.double() * 1.01).to(tensor.dtype),
    }
    return [Fault(f"{name} {what}", replaced(change)) for what, change in changes.items()]


def metadata_faults(correct: Callable, position: int) -> list[Fault]:
    """Make wrong versions that misread the metadata of a 2:4 weight, in the format of ``fusedops.compress_24``.

    Check them with a weight of at least 3 different rows and more than 64 columns, whose pairs stand at all places.

    Args:
        correct: The correct implementation; it must be called with the metadata at that position.
        position: The position of the metadata, uint8 ``[N, bytes]``.

    Returns:
        Ten faults.
    """

    def replaced(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
        def wrong(*args, **kwargs):
            changed = list(args)
            changed[position] = change(args[position]).contiguous()
            return correct(*changed, **kwargs)

        return wrong

    return [Fault(name, replaced(change)) for name, change in _MISREADINGS.items()]


def option_fault(correct: Callable, name: str, **overrides: object) -> Fault:
    """Make a wrong version that always runs with other keyword arguments.

    Args:
        correct: The correct implementation.
        name: The name of the fault.
        overrides: Keyword arguments that replace the caller's.

    Returns:
        The fault.
    """
    return Fault(name, lambda *args, **kwargs: correct(*args, **{**kwargs, **overrides}))


def _is_rejected(check: Callable[[Callable], object], fault: Fault) -> bool:
    try:
        check(fault.wrong)
    except AssertionError:
        return True
    except Exception as error:
        raise RuntimeError(f"planted fault {fault.name!r} crashed instead of giving a wrong result: {error}") from error
    return False


def _damaged(correct: Callable, damage: Callable[[torch.Tensor], torch.Tensor], output: int | None) -> Callable:
    def wrong(*args, **kwargs) -> Outputs:
        result = correct(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            return damage(result)
        return type(result)(
            damage(value) if isinstance(value, torch.Tensor) and output in (None, index) else value
            for index, value in enumerate(result)
        )

    return wrong


def _edited(tensor: torch.Tensor, where: tuple, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[where] = value
    return changed


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """All rows in one dimension."""
    return tensor.reshape(-1, tensor.shape[-1])


def _swap_rows(tensor: torch.Tensor) -> torch.Tensor:
    rows = _rows(tensor).clone()
    rows[[0, -1]] = rows[[-1, 0]]
    return rows.view(tensor.shape)


def _swap_columns(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[..., [0, 1]] = changed[..., [1, 0]]
    return changed


def _coarser(tensor: torch.Tensor) -> torch.Tensor:
    """Values that went through a dtype of fewer bits: TF32-like for float32, four bits less otherwise."""
    bits = 10 if tensor.dtype == torch.float32 else 4
    mantissa, exponent = torch.frexp(tensor.double())
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).to(tensor.dtype)


def _one_element(tensor: torch.Tensor) -> torch.Tensor:
    """One wrong element in the middle, off by 5% of the largest."""
    values = tensor.double().nan_to_num(0.0, 0.0, 0.0).flatten()
    wrong = values[tensor.numel() // 2] + 0.05 * values.abs().max()
    damaged = tensor.flatten().clone()
    damaged[tensor.numel() // 2] = wrong
    return damaged.view(tensor.shape)


def _stale(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of the right size that another call left behind."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return noise.to(tensor.device, tensor.dtype)


def _last_tile_dropped(tensor: torch.Tensor) -> torch.Tensor:
    return _edited(tensor, (..., slice(tensor.shape[-1] // 16 * 16, None)), 0.0)


def _shifted_up(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.double() + 0.01 * tensor.double().nan_to_num(0.0, 0.0, 0.0).abs().max()).to(tensor.dtype)


def _next_group(metadata: torch.Tensor) -> torch.Tensor:
    """Each group has the places of the group before it."""
    return metadata << 4 | metadata.roll(1, -1) >> 4


_MISREADINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "halves of a byte swapped": lambda metadata: metadata << 4 | metadata >> 4,
    "places of a pair swapped": lambda metadata: (metadata & 0x33) << 2 | metadata >> 2 & 0x33,
    "places of the group before": _next_group,
    "places of the row before": lambda metadata: metadata.roll(1, 0),
    "bytes shifted by one": lambda metadata: metadata.roll(1, -1),
    "bytes of a 16-bit word swapped": lambda metadata: metadata.unflatten(-1, (-1, 2)).flip(-1).flatten(-2),
    "words of 16 bits swapped": lambda metadata: metadata.unflatten(-1, (-1, 2, 2)).flip(-2).flatten(-3),
    "always the first two places": lambda metadata: torch.full_like(metadata, 0x44),
    "places counted from the end": lambda metadata: (metadata & 0x33) << 2 ^ 0xCC | (metadata >> 2 & 0x33) ^ 0x33,
    "lower half of a byte for both": lambda metadata: metadata & 15 | metadata << 4,
}

_DAMAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all zeros": torch.zeros_like,
    "all ones": torch.ones_like,
    "never written": lambda tensor: torch.full_like(tensor, float("nan")),
    "stale memory": _stale,
    "negated": torch.neg,
    "sign lost": torch.abs,
    "scaled +1%": lambda tensor: (tensor.double() * 1.01).to(tensor.dtype),
    "scaled -1%": lambda tensor: (tensor.double() * 0.99).to(tensor.dtype),
    "offset by 1% of the largest": _shifted_up,
    "last column dropped": lambda tensor: _edited(tensor, (..., -1), 0.0),
    "last column never written": lambda tensor: _edited(tensor, (..., -1), float("nan")),
    "first column dropped": lambda tensor: _edited(tensor, (..., 0), 0.0),
    "tail beyond a multiple of 16 dropped": _last_tile_dropped,
    "first two columns swapped": _swap_columns,
    "columns shifted by one": lambda tensor: tensor.roll(1, -1),
    "last row dropped": lambda tensor: _edited(_rows(tensor), (-1,), 0.0).view(tensor.shape),
    "first and last row swapped": _swap_rows,
    "rows shifted by one": lambda tensor: _rows(tensor).roll(1, 0).view(tensor.shape),
    "every row like the first": lambda tensor: _rows(tensor)[:1].expand_as(_rows(tensor)).reshape(tensor.shape),
    "one element wrong": _one_element,
    "went through fewer bits": _coarser,
}
