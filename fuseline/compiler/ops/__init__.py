"""The fuseline:: dialect, one op a file."""

from ._define import REGISTRY, Kind, Op, find, op
from .after import after
from .attention import attention
from .cache_attention import cache_attention
from .cache_read import cache_read
from .cache_write import cache_write
from .decode import decode
from .decode_pair_words import decode_pair_words
from .decode_pairs import decode_pairs
from .decode_words import decode_words
from .dequantize import dequantize, pack_nibbles, unpack_nibbles
from .embedding_gradient import embedding_gradient
from .encode import encode
from .encode_at import encode_at
from .fake_quantize import fake_quantize, fake_quantize_backward
from .glu import glu
from .gradients import scale_gradient, sum_gradient
from .hadamard import hadamard
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_gradients
from .lowrank_add import lowrank_add
from .moe import moe
from .moe_backward import moe_backward
from .moe_pairs import moe_pairs
from .quantize import quantize
from .quantize_affine import quantize_affine
from .ring_attention import ring_attention
from .rms_norm import rms_norm
from .rotary import rotary
from .round_through import round_through
from .sparse_linear import sparse_linear
from .staircase import fake_staircase, staircase
from .to_host import arrived, from_host, to_host

__all__ = [
    "REGISTRY", "Kind", "Op", "after", "arrived", "attention", "cache_attention", "cache_read", "cache_write",
    "decode", "decode_pair_words", "decode_pairs", "decode_words", "dequantize", "embedding_gradient", "encode",
    "encode_at", "fake_quantize", "fake_quantize_backward", "fake_staircase", "find", "from_host", "glu",
    "hadamard", "layer_norm", "linear_cross_entropy", "linear_cross_entropy_gradients", "lowrank_add", "moe",
    "moe_backward", "moe_pairs", "op", "pack_nibbles", "quantize", "quantize_affine", "ring_attention", "rms_norm",
    "rotary", "round_through", "scale_gradient", "sparse_linear", "staircase", "sum_gradient", "to_host",
    "unpack_nibbles",
]  # fmt: skip
