"""The fuseline:: dialect, one op a file."""

from ._define import REGISTRY, Kind, Op, find, op
from .attention import attention
from .decode import decode
from .dequantize import dequantize, pack_nibbles
from .encode import encode
from .glu import glu
from .hadamard import hadamard
from .layer_norm import layer_norm
from .quantize import quantize
from .quantize_affine import quantize_affine
from .rms_norm import rms_norm
from .rotary import rotary
from .sparse_linear import sparse_linear

__all__ = [
    "REGISTRY", "Kind", "Op", "attention", "decode", "dequantize", "encode", "find", "glu", "hadamard", "layer_norm",
    "op", "pack_nibbles", "quantize", "quantize_affine", "rms_norm", "rotary",
    "sparse_linear",
]  # fmt: skip
