"""English text that every machine has: the language reference in `pydoc_data.topics` of the standard library.

Half of the topics is for calibration, the other half for evaluation, so that nothing is measured on what it was fitted
to. The text differs a little between versions of Python: compare figures within one version only.
"""

from __future__ import annotations

from collections.abc import Callable
from pydoc_data.topics import topics

import torch


def calibration_text() -> str:
    """The topics at even positions, by name."""
    return _text(0)


def evaluation_text() -> str:
    """The topics at odd positions, by name."""
    return _text(1)


def _text(offset: int) -> str:
    return "\n\n".join(topics[name].strip() for name in sorted(topics)[offset::2])


def windows(text: str, encode: Callable[[str], list[int]], length: int, count: int) -> list[torch.Tensor]:
    """At most `count` windows of `length` tokens, spread evenly over `text` without overlap; each int64 [1, length]."""
    ids = encode(text)
    whole = len(ids) // length
    count = min(count, whole)
    starts = [(i * whole // count) * length for i in range(count)]
    return [torch.tensor(ids[start : start + length]).unsqueeze(0) for start in starts]
