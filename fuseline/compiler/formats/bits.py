"""Codes of 1 to 7 bits, packed without gaps.

A row is a stream of bits, low bits first: code j lies in bits j·b … j·b + b − 1, so that 32 codes fill b 32-bit words
(3-bit codes: 32 in 3 words) and no code's place depends on its width dividing a word. Read as little-endian words, this
is the dense layout of compressed-tensors' `pack-quantized`. The last byte of a row is filled with zeros.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [..., n] below 2^bits → uint8 [..., ⌈n·bits / 8⌉]."""
    n = codes.shape[-1]
    eights = pad(codes, (0, -n % 8)).unflatten(-1, (-1, 8))
    words = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)
    for j in range(8):
        words |= eights[..., j].to(torch.int64) << bits * j
    rows = torch.stack([(words >> 8 * k) & 255 for k in range(bits)], -1).to(torch.uint8)
    return rows.flatten(-2)[..., : -(-n * bits // 8)].contiguous()


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse: uint8 [..., n]."""
    runs = pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    words = torch.zeros(runs.shape[:-1], dtype=torch.int64, device=packed.device)
    for k in range(bits):
        words |= runs[..., k].to(torch.int64) << 8 * k
    codes = torch.stack([(words >> bits * j) & (1 << bits) - 1 for j in range(8)], -1).to(torch.uint8)
    return codes.flatten(-2)[..., :n]
