"""The fuseline:: dialect, one op a file."""

from ._define import REGISTRY, Kind, Op, find, op
from .attention import attention
from .cache_attention import cache_attention
from .cache_read import cache_read
from .cache_write import cache_write
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

__all__ = [
    "REGISTRY", "Kind", "Op", "attention", "cache_attention", "cache_read", "cache_write", "decode", "dequantize",
    "encode", "find", "glu", "hadamard", "layer_norm", "op", "pack_nibbles", "quantize",
    "quantize_affine", "rms_norm", "rotary",
]  # fmt: skip
