"""Quantise or sparsify the linears of a model that is already built, in place, with a report and a way back.

`fusedops.quantize_` and `fusedops.sparsify_` are the ways in. Any model is taken: linears are found by their class,
norms and products that SmoothQuant needs by what they compute.
"""

from fusedops.convert.distill import distill_
from fusedops.convert.fake import FakeQuantizedModel, fake_quantize_
from fusedops.convert.handle import QuantizedModel, SparsifiedModel
from fusedops.convert.quantize import quantize_
from fusedops.convert.report import Report, Row, Smoothing
from fusedops.convert.schemes import SCHEMES, Scheme
from fusedops.convert.sparsify import MaskedModel, sparsify_

__all__ = [
    "SCHEMES",
    "FakeQuantizedModel",
    "MaskedModel",
    "QuantizedModel",
    "Report",
    "Row",
    "Scheme",
    "Smoothing",
    "SparsifiedModel",
    "distill_",
    "fake_quantize_",
    "quantize_",
    "sparsify_",
]
