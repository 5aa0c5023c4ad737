"""Quantise the linears of a model that is already built."""

from fusedops.convert.schemes import SCHEMES, Scheme

__all__ = ["SCHEMES", "Scheme"]
