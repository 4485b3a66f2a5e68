"""Signs for randomised Hadamard matrices, the same on every machine and under every version of PyTorch."""

from __future__ import annotations

import hashlib


def random_signs(n: int, seed: int) -> tuple[int, ...]:
    """n signs, 1 or −1: bit i mod 256 of SHA-256("fuseline signs <seed> <i // 256>"), least significant first."""
    signs: list[int] = []
    for block in range(-(-n // 256)):
        bits = int.from_bytes(hashlib.sha256(f"fuseline signs {seed} {block}".encode()).digest(), "little")
        signs += [-1 if bits >> i & 1 else 1 for i in range(256)]
    return tuple(signs[:n])
