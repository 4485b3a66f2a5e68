"""Text of every machine with Python, as bytes: the standard library's sources and the language reference in it."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch

EVERY = 16
"""One text of so many is held out."""
LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data", "encodings",
}  # fmt: skip
SHORTEST, LONGEST = 500, 150_000
"""Bytes: what is longer is mostly tables."""


class Corpus:
    """training, held_out: uint8 tensors on a device, of texts that lie in one of them alone.

    Args:
        limit: bytes in all; whole texts are taken, and where there are fewer, all of them.
    """

    def __init__(self, limit: int, device: torch.device):
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        total = 0
        for number, text in enumerate(texts()):
            parts[number % EVERY == EVERY - 1].append(text + b"\n\n")
            total += len(text)
            if total >= limit:
                break
        if not all(parts):
            raise SystemExit(f"error: {limit} bytes are too few: none are held out")
        self.training, self.held_out = (
            torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).to(device) for part in parts
        )

    def batches(self, count: int, size: int, length: int, seed: int) -> Iterator[torch.Tensor]:
        """`count` batches of training windows that a seed draws, int64 [size, length + 1]."""
        draw = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.training) - length - 1, (count, size, 1), generator=draw)
        starts, reach = starts.to(self.training.device), torch.arange(length + 1, device=self.training.device)
        for each in starts:
            yield self.training[each + reach].long()

    def windows(self, count: int, size: int, length: int) -> Iterator[torch.Tensor]:
        """At most `count` windows of the held-out text, spread evenly, in batches int64 [≤ size, length + 1]."""
        whole = len(self.held_out) // (length + 1)
        count = min(count, whole)
        starts = torch.tensor([(i * whole // count) * (length + 1) for i in range(count)])
        starts, reach = starts.to(self.held_out.device), torch.arange(length + 1, device=self.held_out.device)
        for each in starts.view(-1, 1).split(size):
            yield self.held_out[each + reach].long()


def texts() -> Iterator[bytes]:
    """Sources and topics, mixed in an order that depends on their names alone."""
    library = Path(sysconfig.get_path("stdlib"))
    found = {f"topic {name}": topics[name].strip().encode() for name in topics}
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not LEFT_OUT & set(name.parts) and not name.name.startswith("_sysconfigdata"):
            found[name.as_posix()] = path.read_bytes()
    for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if SHORTEST <= len(found[name]) <= LONGEST:
            yield found[name]
