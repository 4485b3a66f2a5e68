"""The fuseline:: dialect, one op a file."""

from ._define import REGISTRY, Kind, Op, find, op
from .attention import attention
from .cache_attention import cache_attention
from .cache_read import cache_read
from .cache_write import cache_write
from .decode import decode
from .decode_words import decode_words
from .dequantize import dequantize, pack_nibbles, unpack_nibbles
from .encode import encode
from .encode_at import encode_at
from .fake_quantize import fake_quantize, fake_quantize_backward
from .glu import glu
from .hadamard import hadamard
from .layer_norm import layer_norm
from .quantize import quantize
from .quantize_affine import quantize_affine
from .rms_norm import rms_norm
from .rotary import rotary
from .round_through import round_through
from .sparse_linear import sparse_linear
from .staircase import fake_staircase, staircase
from .to_host import arrived, from_host, to_host

__all__ = [
    "REGISTRY",
    "Kind",
    "Op",
    "arrived",
    "attention",
    "cache_attention",
    "cache_read",
    "cache_write",
    "decode",
    "decode_words",
    "dequantize",
    "encode",
    "encode_at",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_staircase",
    "find",
    "from_host",
    "glu",
    "hadamard",
    "layer_norm",
    "op",
    "pack_nibbles",
    "quantize",
    "quantize_affine",
    "rms_norm",
    "rotary",
    "round_through",
    "sparse_linear",
    "staircase",
    "to_host",
    "unpack_nibbles",
]
