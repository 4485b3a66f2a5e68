"""Codes of 1 to 8 bits, or 10, in 32-bit words as the tensor-core kernels read them, without gaps.

A word is two halves of 16 bits, and word j of a run of R holds neighbours: with a mask and a shift its halves become
codes 2j and 2j + 1 of a *piece* of 2R channels, so that one instruction works on two codes and pieces come out in the
channels' order. Codes of 8, 4, 2 or 1 bits fill a half; other widths are split into such parts, the low bits first,
each in words of its own (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1, 10 = 8 + 2). The narrowest part has
16 / width pieces a word, and so many pieces are a *chunk*:

    4 bits, R = 16     chunk = 16 words: 4 pieces of 32 channels; bits 4i … 4i + 3 of both halves are piece i
    3 bits, R = 16     chunk = 48 words: two sets of 16 with 2 bits of 8 pieces each, one with the high bit of all 16

A chunk holds as many bits as its codes. A row is padded with zeros to whole chunks where no run fits its length. The
chunks of COLUMNS neighbouring rows (output columns), which a kernel reads together, lie together. Splitting codes into
bit planes of powers of two is FP6-LLM's idea (Xia et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

RUNS = (32, 16, 8)
COLUMNS = 64
_PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,), 10: (8, 2)}


@dataclass(frozen=True)
class Words:
    """The layout of codes of `bits` bits in runs of `run` words."""

    bits: int
    run: int

    @staticmethod
    def fitting(bits: int, channels: int, group: int) -> Words | None:
        """The longest run whose chunks divide a row, else the one that pads least; None where none keeps to groups.

        group: channels that share a scale, which pieces may not cross; `channels` where all do.
        """
        most = RUNS[0] if bits == 8 else RUNS[1]  # chunks of 4-bit codes are as long as those of 8-bit codes
        runs = [run for run in RUNS if run <= most and (group == channels or group % (2 * run) == 0)]
        if not runs:
            return None
        return min((Words(bits, run) for run in runs), key=lambda w: w.padded(channels))

    @property
    def parts(self) -> tuple[int, ...]:
        """Widths of the parts, the low bits first."""
        return _PARTS[self.bits]

    @property
    def pieces(self) -> int:
        """Of a chunk."""
        return 16 // min(self.parts)

    @property
    def chunk(self) -> int:
        """Codes of a chunk."""
        return 2 * self.run * self.pieces

    @property
    def chunk_words(self) -> int:
        return self.chunk * self.bits // 32

    def padded(self, channels: int) -> int:
        """Codes of a row with its padding."""
        return -(-channels // self.chunk) * self.chunk

    def row(self, channels: int) -> int:
        """Words of a row."""
        return self.padded(channels) * self.bits // 32

    def places(self, piece: int) -> list[tuple[int, int, int, int]]:
        """Where a piece's bits are: for each part (set of R words, bit in each half, width, first bit of the code)."""
        found, before, low = [], 0, 0
        for width in self.parts:
            per_word = 16 // width
            found.append((before + piece // per_word, piece % per_word * width, width, low))
            before += self.pieces // per_word
            low += width
        return found

    def shape(self, rows: int, channels: int) -> tuple[int, int, int, int]:
        """Of the words of so many rows."""
        return -(-rows // COLUMNS), self.padded(channels) // self.chunk, COLUMNS, self.chunk_words

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes uint8 (int16 those of more than 8 bits) [rows, n] below 2^bits → int32 of `shape(rows, n)`."""
        rows, n = codes.shape
        padded = pad(codes, (0, self.padded(n) - n, 0, -rows % COLUMNS)).to(torch.int32)
        chunks = padded.unflatten(-1, (-1, self.pieces, self.run, 2))
        sets = codes.new_zeros((*chunks.shape[:-3], self.chunk_words // self.run, self.run), dtype=torch.int32)
        for piece in range(self.pieces):
            for at, bit, width, low in self.places(piece):
                pairs = (chunks[..., piece, :, :] >> low) & 2**width - 1
                sets[..., at, :] |= (pairs[..., 0] << bit) | (pairs[..., 1] << bit + 16)
        return sets.flatten(-2).unflatten(0, (-1, COLUMNS)).transpose(1, 2).contiguous()

    def unpack(self, words: torch.Tensor, rows: int, n: int) -> torch.Tensor:
        """The inverse: [rows, n]."""
        sets = words.transpose(1, 2).flatten(0, 1).unflatten(-1, (self.chunk_words // self.run, self.run))
        shape = (*sets.shape[:-2], self.pieces, self.run, 2)
        dtype = torch.int16 if self.bits > 8 else torch.uint8
        codes = torch.zeros(shape, dtype=dtype, device=words.device)
        for piece in range(self.pieces):
            for at, bit, width, low in self.places(piece):
                for half in range(2):
                    found = (sets[..., at, :] >> bit + 16 * half) & 2**width - 1
                    codes[..., piece, :, half] |= (found << low).to(dtype)
        return codes.flatten(1)[:rows, :n]


def as_bits(codes: torch.Tensor) -> torch.Tensor:
    """Codes of an element's stored type as uint8: int8 with 128 added, 8-bit floating-point numbers as their bits."""
    return codes.view(torch.uint8) ^ 128 if codes.dtype == torch.int8 else codes.view(torch.uint8)


def as_stored(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse."""
    return (bits ^ 128).view(dtype) if dtype == torch.int8 else bits.view(dtype)
