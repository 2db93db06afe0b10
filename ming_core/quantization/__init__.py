"""Weight-only quantization of the language model and the flow head: formats, kernels, layers."""

from .formats import FORMATS
from .layers import (
    QuantizedLinear,
    QuantizedStackedLinear,
    QuantizedWeight,
    check_format,
    packed_state_dict,
    quantize,
    unpack_weights,
)

__all__ = [
    "FORMATS",
    "QuantizedLinear",
    "QuantizedStackedLinear",
    "QuantizedWeight",
    "check_format",
    "packed_state_dict",
    "quantize",
    "unpack_weights",
]
