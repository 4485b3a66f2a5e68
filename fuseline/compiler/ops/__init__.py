"""The fuseline:: dialect, one op a file."""

from ._define import REGISTRY, Kind, Op, find, op
from .attention import attention
from .decode import decode
from .dequantize import dequantize, pack_nibbles
from .encode import encode
from .fake_quantize import fake_quantize, fake_quantize_backward
from .glu import glu
from .hadamard import hadamard
from .layer_norm import layer_norm
from .quantize import quantize
from .quantize_affine import quantize_affine
from .rms_norm import rms_norm
from .rotary import rotary
from .round_through import round_through
from .staircase import fake_staircase, staircase

__all__ = [
    "REGISTRY", "Kind", "Op", "attention", "decode", "dequantize", "encode", "fake_quantize",
    "fake_quantize_backward", "fake_staircase", "find", "glu", "hadamard", "layer_norm", "op", "pack_nibbles",
    "quantize", "quantize_affine", "rms_norm", "rotary", "round_through", "staircase",
]  # fmt: skip
