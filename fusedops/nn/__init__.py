"""Modules with torch's names, constructors and state dicts, and our operators inside."""

from fusedops.nn.modules import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "RMSNorm"]
