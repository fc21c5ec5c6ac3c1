"""Tables in fewer bytes: `quantize` and `dequantize`, what they report, and the search for each table's precision."""

from dlrm_rs.quantization.budget import Budget, Trial
from dlrm_rs.quantization.quantize import dequantize, quantize
from dlrm_rs.quantization.report import QuantizationReport, TableReport

__all__ = ["Budget", "QuantizationReport", "TableReport", "Trial", "dequantize", "quantize"]
