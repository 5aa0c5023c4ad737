"""Modules with torch's names, constructors and state dicts, and our operators inside; quantised and sparse linears."""

from fusedops.nn.fake_quantized_linear import FakeQuantizedLinear
from fusedops.nn.masked_24_linear import Masked24Linear
from fusedops.nn.modules import LayerNorm, RMSNorm
from fusedops.nn.quantized_embedding import QuantizedEmbedding
from fusedops.nn.quantized_linear import QuantizedLinear
from fusedops.nn.scaled_linear import Fp8Linear, Int8Linear
from fusedops.nn.sparse_24_linear import Sparse24Linear
from fusedops.nn.weight_only_linear import WeightOnlyLinear

__all__ = [
    "FakeQuantizedLinear",
    "Fp8Linear",
    "Int8Linear",
    "LayerNorm",
    "Masked24Linear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "Sparse24Linear",
    "WeightOnlyLinear",
]
