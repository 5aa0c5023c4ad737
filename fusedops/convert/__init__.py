"""Quantise the linears of a model that is already built, in place, with a report and a way back.

`fusedops.quantize_` is the way in. Any model is taken: linears are found by their class, norms and products that
SmoothQuant needs by what they compute.
"""

from fusedops.convert.fake import FakeQuantizedModel, fake_quantize_
from fusedops.convert.handle import QuantizedModel
from fusedops.convert.quantize import quantize_
from fusedops.convert.report import Report, Row, Smoothing
from fusedops.convert.schemes import SCHEMES, Scheme

__all__ = [
    "SCHEMES",
    "FakeQuantizedModel",
    "QuantizedModel",
    "Report",
    "Row",
    "Scheme",
    "Smoothing",
    "fake_quantize_",
    "quantize_",
]
