"""Modules with torch's names, constructors and state dicts, and our operators inside; and quantised linear layers."""

from fusedops.nn.fake_quantized_linear import FakeQuantizedLinear
from fusedops.nn.modules import LayerNorm, RMSNorm
from fusedops.nn.quantized_linear import QuantizedLinear
from fusedops.nn.scaled_linear import Fp8Linear, Int8Linear
from fusedops.nn.weight_only_linear import WeightOnlyLinear

__all__ = [
    "FakeQuantizedLinear",
    "Fp8Linear",
    "Int8Linear",
    "LayerNorm",
    "QuantizedLinear",
    "RMSNorm",
    "WeightOnlyLinear",
]
