"""A model in 8 bits: static quantization of its ONNX file by ONNX Runtime's quantizer, calibrated on real batches.

Here: which operators, which types, which ranges, and how far the outputs moved. Not here: accuracy (experiments/).
"""

from lightning_prune.quantization.quantize import QuantizationReport, quantize, refuse_quantized
from lightning_prune.quantization.quantizer import Cpu, Method

__all__ = ["Cpu", "Method", "QuantizationReport", "quantize", "refuse_quantized"]
