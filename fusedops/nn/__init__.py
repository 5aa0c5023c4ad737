"""Modules with torch's names, constructors and state dicts, and our operators inside; and quantised linear layers."""

from fusedops.nn.modules import LayerNorm, RMSNorm
from fusedops.nn.quantized_linear import Fp8Linear, Int8Linear, QuantizedLinear, WeightOnlyLinear

__all__ = ["Fp8Linear", "Int8Linear", "LayerNorm", "QuantizedLinear", "RMSNorm", "WeightOnlyLinear"]
