"""What modules share that hold codes and scales in the place of a weight."""

import torch
from torch import nn
from torch.nn import Parameter

from fusedops.nn._linear import keeping_dtypes, misfits


class StoredModule(nn.Module):
    """A module with a ``weight`` of codes, and with a dtype that is that of what the codes stand for.

    Attributes:
        options: The options of the format, by name.
        dtype: dtype of the weight that `dequantize` gives; follows ``.to(dtype)``.
    """

    KEPT = ()  # parameters and buffers whose dtype belongs to the format, whatever the module is converted to

    def take(self, stored):
        """Make tensors, such as `quantize_weight` gives, the module's parameters of their names; parameters stay."""
        for name, tensor in stored.items():
            is_parameter = isinstance(tensor, Parameter)
            setattr(self, name, tensor if is_parameter else Parameter(tensor, requires_grad=False))

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(keeping_dtypes(fn, [getattr(self, name, None) for name in self.KEPT]), recurse)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        """Nothing of this module is loaded where one of its tensors does not fit."""
        found = misfits(type(self).__name__, self._parameters, self.KEPT, state_dict, prefix)
        if found:
            errors.extend(found)
        else:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
