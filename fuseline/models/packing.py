"""Codes in 32-bit words, as checkpoints store them: the first in the lowest bits, none with a gap before it.

Of 1, 2, 4 and 8 bits a word holds 32/b codes. Of other widths codes cross from word to word (3 bits: 32 codes in 3
words), as in GPTQ's files; releases of compressed-tensors differ there, and a file does not say which of them wrote it.
"""

from __future__ import annotations

import torch

from fuseline.compiler.formats import bits as dense
from fuseline.compiler.formats.words import Words

WIDTHS = (1, 2, 4, 8)
"""Bits of the codes that every release of compressed-tensors packs alike."""


def unpack_unsigned(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 words [rows, m] → uint8 [rows, count], the codes as they stand in the words, 0 … 2^b − 1."""
    return dense.unpack(words.contiguous().view(torch.uint8), bits, count) if bits < 8 else _bytes(words, count)


def unpack_planes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The same of words in planes, as GPTQModel's format `gptq_p` has them; count: a multiple of 32.

    Each 32 codes are `bits` words: the low bits of all of them in planes of 4, 2 or 1 bits, then the higher ones.
    """
    runs, planes, first, low = words.unflatten(-1, (-1, bits)), Words(bits, 16).parts, 0, 0
    codes = torch.zeros((*runs.shape[:-1], 32), dtype=torch.uint8, device=words.device)
    for width in planes if bits < 8 else (8,):
        codes |= unpack_unsigned(runs[..., first : first + width], width, 32) << low
        first, low = first + width, low + width
    return codes.flatten(-2)[..., :count]


def _bytes(words: torch.Tensor, count: int) -> torch.Tensor:
    return words.contiguous().view(torch.uint8)[..., :count].contiguous()


def pack_words(codes: torch.Tensor, bits: int, dim: int = -1) -> torch.Tensor:
    """Signed codes, int8 [rows, n] in −2^(b−1) … 2^(b−1) − 1, → int32 with ⌈n·b/32⌉ words along `dim`, b of `WIDTHS`.

    What is stored is code + 2^(b−1).
    """
    per = 32 // bits
    values = codes.movedim(dim, -1).to(torch.int32) + (1 << (bits - 1))
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % per)).unflatten(-1, (-1, per))
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
    words = (values << shifts).sum(-1, dtype=torch.int32)  # no two share a bit
    return words.movedim(-1, dim).contiguous()


def unpack_words(words: torch.Tensor, bits: int, count: int, dim: int = -1) -> torch.Tensor:
    """The inverse: int32 words → int8 with `count` codes along `dim`."""
    codes = unpack_unsigned(words.movedim(dim, -1), bits, count).to(torch.int16) - (1 << (bits - 1))
    return codes.to(torch.int8).movedim(-1, dim).contiguous()
