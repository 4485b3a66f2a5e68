"""Random signs and random orthogonal matrices, from a seed."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


def random_signs(n: int, seed: int) -> tuple[int, ...]:
    """n signs, 1 or −1, the same under every version of PyTorch.

    Sign i is bit i mod 256 of SHA-256("fuseline signs <seed> <i // 256>"), least significant first.
    """
    signs: list[int] = []
    for block in range(-(-n // 256)):
        bits = int.from_bytes(hashlib.sha256(f"fuseline signs {seed} {block}".encode()).digest(), "little")
        signs += [-1 if bits >> i & 1 else 1 for i in range(256)]
    return tuple(signs[:n])


@lru_cache(maxsize=4)
def random_orthogonal(n: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix [n, n], float64, drawn uniformly: the Q of a Gaussian matrix with R's diagonal positive."""
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()
