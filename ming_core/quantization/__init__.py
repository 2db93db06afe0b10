"""Weight-only quantization of the language model and the flow head: formats, layers, kernels."""

from .layers import FORMATS, SCALE, Quantized, arrange_plainly, quantize

__all__ = ["FORMATS", "SCALE", "Quantized", "arrange_plainly", "quantize"]
