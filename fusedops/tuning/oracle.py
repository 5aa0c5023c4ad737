"""Whether a configuration computes what the operator means: against the reference in float64, on fresh NaN."""

import inspect
import warnings
from contextlib import contextmanager

import torch

from fusedops.testing.accuracy import Budget, assert_accurate, errors

DEFAULT_MARGIN = 1.25  # so much less accurate than the default may a configuration be where the budget is tighter
BROKEN = 8.0  # times the budget: a default beyond is no measure of anything
MAX_CODES_APART = 0.05  # share of codes that may lie one step beside the reference's, where a rounding turned
_CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
_ALIGNMENT = 16  # bytes; kernels are compiled for addresses that are multiples of it, or not


class Wrong(Exception):
    """A configuration does not compute what it should."""


class Oracle:
    """Judges calls of one registered operator on fixed arguments, which stay as they are.

    Args:
        operator: The registered operator.
        args: Its arguments.
    """

    def __init__(self, operator, args):
        self._operator = operator
        self._args = args
        schema = operator._op._schema.arguments
        self._written = [place for place, one in enumerate(schema) if one.alias_info and one.alias_info.is_write]
        self._truth = None
        self._budgets = None

    def check(self, call=None):
        """Run the operator twice on clones, the outputs in memory of NaN. Wrong: a result is not what it should be."""
        first, second = self._run(call), self._run(call)
        for one, other in zip(first, second, strict=True):
            if not _same(one, other):
                raise Wrong("the second call gives other bits than the first")
        if self._truth is None:
            self._truth = self._reference(any(out.dtype in _CODES for out in first))
        if self._budgets is None:
            self._budgets = [self._budget(out, truth) for out, truth in zip(first, self._truth, strict=True)]
        for number, (out, truth, budget) in enumerate(zip(first, self._truth, self._budgets, strict=True)):
            try:
                _compare(out, truth, budget, self._args[0].dtype, f"result {number}")
            except AssertionError as error:
                raise Wrong(str(error)) from error

    def _run(self, call):
        """What is returned and what is written to, of a call on clones."""
        args = cloned(self._args)
        with poisoned(), torch.no_grad():
            returned = (call or self._operator)(*args)
        for place, (before, after) in enumerate(zip(self._args, args)):
            if isinstance(before, torch.Tensor) and place not in self._written and not _same(before, after):
                raise Wrong(f"argument {place} was written to")
        return [*_as_list(returned), *(args[place] for place in self._written if args[place] is not None)]

    def _reference(self, codes):
        """The reference's results: in float64, but where there are codes in the arguments' own dtypes."""
        function = getattr(self._operator.module("reference"), self._operator.name)
        given = cloned(self._args)
        options = {}
        if not codes:
            if "round_to" in inspect.signature(function).parameters:
                options["round_to"] = self._args[0].dtype
            given = [_wide(arg) for arg in given]
        with torch.no_grad():
            returned = function(*given, **options)
        return [*_as_list(returned), *(given[place] for place in self._written if given[place] is not None)]

    def _budget(self, out, truth):
        """The dtype's own, raised to what the default configuration, which is judged first, needs."""
        if out.dtype in _CODES or not out.is_floating_point() or truth.dtype != torch.float64:
            return None
        usual, found = Budget.for_dtype(out.dtype), errors(out, truth)
        if found.rms > BROKEN * usual.rms or found.peak > BROKEN * usual.peak:
            return usual  # which it then fails
        return Budget(max(usual.rms, DEFAULT_MARGIN * found.rms), max(usual.peak, DEFAULT_MARGIN * found.peak))


def _compare(out, truth, budget, dtype, name):
    if truth.shape != out.shape:
        raise AssertionError(f"{name}: has shape {list(out.shape)}, not {list(truth.shape)}")
    if budget is not None:
        assert_accurate(out, truth, budget=budget, name=name, zeros=False)
    elif out.dtype in _CODES:
        apart = (_steps(out) - _steps(truth)).abs()
        if int(apart.max() if apart.numel() else 0) > 1 or int((apart > 0).sum()) > MAX_CODES_APART * apart.numel():
            raise AssertionError(f"{name}: {int((apart > 0).sum())} of {apart.numel()} codes differ, the farthest by "
                                 f"{int(apart.max())} steps")  # fmt: skip
    elif out.is_floating_point():  # a scale beside codes: of values that were rounded to the arguments' dtype
        torch.testing.assert_close(out, truth, rtol=2 * torch.finfo(dtype).eps, atol=0.0, equal_nan=True)
    else:
        torch.testing.assert_close(out, truth, rtol=0, atol=0)


def _steps(codes):
    """Codes as numbers that grow by one from each to the next larger."""
    if codes.dtype == torch.uint8 or codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.int8).int()
    return torch.where(bits < 0, -(bits & 0x7F), bits)


def _wide(arg):
    if isinstance(arg, torch.Tensor):
        return arg.double() if arg.is_floating_point() and arg.dtype not in _CODES else arg
    return torch.float64 if isinstance(arg, torch.dtype) and arg.is_floating_point and arg.itemsize > 1 else arg


def _as_list(value):
    if value is None:
        return []
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _same(one, other):
    """Whether two tensors have the same bits, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def cloned(args):
    """The arguments with every tensor in memory of its own, of the same strides and alignment; one stays one."""
    copies = {}
    return [_copy(arg, copies) if isinstance(arg, torch.Tensor) else arg for arg in args]


def _copy(tensor, copies):
    if id(tensor) not in copies:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
        reach = reach if tensor.numel() else 0
        shift = tensor.data_ptr() % _ALIGNMENT // tensor.element_size()
        room = torch.empty(reach + shift, dtype=tensor.dtype, device=tensor.device)
        room[shift:].copy_(tensor.detach().as_strided((reach,), (1,), tensor.storage_offset()))
        copies[id(tensor)] = room.as_strided(tensor.shape, tensor.stride(), shift)
    return copies[id(tensor)]


@contextmanager
def poisoned():
    """For the length of a block fresh memory holds NaN, so that what a kernel leaves unwritten shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )  # fmt: skip
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
