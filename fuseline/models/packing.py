"""Codes in 32-bit words, as `pack-quantized` checkpoints of compressed-tensors store them.

A code of b bits is stored as code + 2^(b−1), 32/b to a word, the first in the lowest bits. Only widths that divide 32
are taken: for others releases of compressed-tensors differ, and a file does not say which of them wrote it.
"""

from __future__ import annotations

import torch

WIDTHS = (1, 2, 4, 8)


def pack_words(codes: torch.Tensor, bits: int, dim: int = -1) -> torch.Tensor:
    """Signed codes, int8 [rows, n] in −2^(b−1) … 2^(b−1) − 1, → int32 with ⌈n·b/32⌉ words along `dim`."""
    per = 32 // bits
    values = codes.movedim(dim, -1).to(torch.int32) + (1 << (bits - 1))
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % per)).unflatten(-1, (-1, per))
    words = (values << _shifts(bits, codes.device)).sum(-1, dtype=torch.int32)  # no two share a bit
    return words.movedim(-1, dim).contiguous()


def unpack_words(words: torch.Tensor, bits: int, count: int, dim: int = -1) -> torch.Tensor:
    """The inverse: int32 words → int8 with `count` codes along `dim`."""
    values = (words.movedim(dim, -1).unsqueeze(-1) >> _shifts(bits, words.device)) & ((1 << bits) - 1)
    codes = (values - (1 << (bits - 1))).to(torch.int8).flatten(-2)[..., :count]
    return codes.movedim(-1, dim).contiguous()


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 32, bits, dtype=torch.int32, device=device)
