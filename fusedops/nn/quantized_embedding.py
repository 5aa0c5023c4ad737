"""An embedding that looks up the quantised weight which it shares with an output head."""

import torch
from torch import nn
from torch.nn import functional as F

from fusedops._core import checks
from fusedops.nn._linear import dequantized_weight
from fusedops.nn._stored import StoredModule
from fusedops.nn.weight_only_linear import WeightOnlyLinear


class QuantizedEmbedding(StoredModule):
    """Look up rows of codes, and give what they stand for.

    ``out = dequantised weight[indices]``, in place of ``torch.nn.Embedding``

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: As in ``torch.nn.Embedding``. The weight is 0 until
            it is loaded, or shared with a `WeightOnlyLinear` by `sharing`.
        format, group_size: As in `WeightOnlyLinear`.

    Stored, and not trained: what a `WeightOnlyLinear` of ``[num_embeddings, embedding_dim]`` stores, by the same names.

    Raises:
        ValueError: a size is below 1, or an option is none of these.

    Numerics: a row is its codes (less their zero) times their scales in float32, rounded once to the module's dtype:
        the row of `WeightOnlyLinear.dequantize`, bit for bit.
    """

    KEPT = WeightOnlyLinear.KEPT

    def __init__(self, num_embeddings, embedding_dim, padding_idx=None, device=None, dtype=None, *, format="int8",
                 group_size=None):  # fmt: skip
        super().__init__()
        for name, size in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
            if size < 1:
                raise ValueError(f"QuantizedEmbedding: {name} must be at least 1, got {size}")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.options = WeightOnlyLinear.checked(format=format, group_size=group_size)
        layout = WeightOnlyLinear.layout(embedding_dim, num_embeddings, self.dtype, **self.options)
        for name, (shape, stored) in layout.items():
            fill = torch.ones if name.endswith("scale") else torch.zeros
            self.take({name: fill(shape, dtype=stored, device=device)})

    @classmethod
    def sharing(cls, linear, embedding):
        """The module for the place of a ``torch.nn.Embedding``, with the parameters of a `WeightOnlyLinear`."""
        made = cls(*embedding.weight.shape, embedding.padding_idx, "meta", linear.dtype, **linear.options)
        made.take({name: linear._parameters[name] for name in made._parameters})
        return made.train(embedding.training)

    def forward(self, input):
        """Rows ``[..., embedding_dim]`` for indices ``[...]`` of int32 or int64."""
        checks.bind_shapes("QuantizedEmbedding", input=(input, "..."))
        if input.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"QuantizedEmbedding: input must be int32 or int64, got {input.dtype}")
        taken = {name: _rows(tensor, input) for name, tensor in self._parameters.items()}
        return self._dequantized(taken, self.dtype).view(*input.shape, self.embedding_dim)

    def dequantize(self, dtype=None):
        """The weight ``[num_embeddings, embedding_dim]``, rounded to `dtype`, by default to the module's."""
        return self._dequantized(self._parameters, self.dtype if dtype is None else dtype)

    def to_embedding(self, dtype=None):
        """A ``torch.nn.Embedding`` with the dequantised weight."""
        dtype = self.dtype if dtype is None else dtype
        made = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta", dtype=dtype)
        made.weight = nn.Parameter(self.dequantize(dtype))
        return made.train(self.training)

    def _dequantized(self, parameters, dtype):
        return dequantized_weight(parameters, self.embedding_dim, dtype)

    def extra_repr(self):
        """Arguments in the printed form of a model."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}{options}"


def _rows(tensor, indices):
    """Rows of a table, or of codes ``[1, N, columns]``; torch looks nothing up in float8, so bytes are taken."""
    table, indices = tensor.detach(), indices.reshape(-1)
    if table.dim() == 1:
        return F.embedding(indices, table[:, None])[:, 0]
    if table.dim() == 3:
        return F.embedding(indices, table[0].view(torch.int8)).view(table.dtype)[None]
    return F.embedding(indices, table)
