"""A result that exists as quantised rows, and as an ordinary tensor from the moment that something reads it."""

import torch
from torch.utils._pytree import tree_map

from fusedops._core.register import watched
from fusedops.nn._linear import autocast_dtype
from fusedops.patch.instance import record_fallback

_any_autocast = torch._C._is_any_autocast_enabled

READ = "its result is read by more than quantised linears"
MAX_READS = 4  # of one module's results, before it hands on ordinary tensors again


class QuantizedRows(torch.Tensor):
    """What a replaced norm or gate hands on where quantised linears take its result.

    It has the shape, dtype and device of the result but no memory. The linears take `values` and `scale`. Any other
    operation, also one that this package has never heard of, makes the result first and works on that, so that code
    in between sees the very numbers that it saw before.

    Args:
        values, scale: The quantised rows.
        dtype: That of the result.
        make: Function that computes the result.
        state: State of the module whose result it is; counts how often it was read.

    Attributes:
        values, scale: The quantised rows.
        made: The result, once something has asked for it; the quantised rows are gone then.
    """

    # operations come in at __torch_dispatch__, attributes such as shape cost no Python
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values, scale, dtype, make, state):
        """A tensor like `values` but for its dtype."""
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype, device=values.device)

    def __init__(self, values, scale, dtype, make, state):
        self.values = values
        self.scale = scale
        self.made = None
        self._make = make
        self._state = state

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Run an operation on the ordinary tensor."""
        first = args[0] if args else None
        out = function(*tree_map(_read, args), **tree_map(_read, kwargs or {}))
        return first if isinstance(first, cls) and out is first.made else out

    def read(self):
        """The ordinary tensor, from now on in place of the quantised rows."""
        if self.made is None:
            self.made = self._make()
            record_fallback(self._state.fallbacks, "", READ, ())
            self.values = self.scale = self._make = self._state = None
        return self.made

    def peek(self):
        """The ordinary tensor, for a look that changes nothing."""
        return self._make() if self.made is None else self.made

    # torch refuses these for subclasses without memory, or gives the address 0

    def data_ptr(self):
        """Address of the ordinary tensor."""
        return self.read().data_ptr()

    def untyped_storage(self):
        """Memory of the ordinary tensor."""
        return self.read().untyped_storage()

    def numpy(self, **options):
        """The ordinary tensor as an array."""
        return self.read().numpy(**options)

    def tolist(self):
        """The ordinary tensor as lists."""
        return self.read().tolist()

    def __deepcopy__(self, memo):
        """A copy is ordinary."""
        return memo.setdefault(id(self), self.read().clone())

    def __reduce_ex__(self, protocol):
        """A pickle is ordinary."""
        return self.read().__reduce_ex__(protocol)


def wanted(state, x):
    """Whether a module whose results go to quantised linears shall hand them on as quantised rows.

    Args:
        state: Its State, with `rows`, the dtype that the linears take, and `steady`, whether the code around it was
            seen to leave its input alone afterwards.
        x: Its input, which the result may have to be made of later; an inference tensor does not tell whether it was
            changed in place.
    """
    return (
        state.rows is not None
        and not torch.is_grad_enabled()
        and not watched()
        and type(x) is torch.Tensor
        and (state.steady or not x.is_inference())
        and state.fallbacks.get(READ, 0) < MAX_READS
        and not (_any_autocast() and autocast_dtype(x))
    )


def version_of(tensor):
    """Counts changes in place; None for an inference tensor, which does not tell."""
    return None if tensor.is_inference() else tensor._version


def unchanged(x, version):
    """x, of which a result is made late.

    Raises:
        RuntimeError: it was changed in place since.
    """
    if version_of(x) != version:
        raise RuntimeError("patch: an input of a norm or gate was changed in place before its result was read")
    return x


def _read(value):
    return value.read() if isinstance(value, QuantizedRows) else value


def peek(value):
    """A value with ordinary tensors in place of quantised rows, which stay what they are."""
    return tree_map(lambda part: part.peek() if isinstance(part, QuantizedRows) else part, value)
