"""Tensors that took long to compute, on disk: the decompositions of weights that an analysis makes.

They are found by all that they were computed from, digests of tensors among it, so that other weights or other data are
other entries. They lie apart from compiled code, with a limit of their own: a model's factors are gigabytes, and must
not push its kernels out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .cache import Cache
from .entry import Entry
from .location import cache_root, size_limit

KIND = "tensors"
FILE = "tensors.safetensors"
SHARE = 8
"""Bytes of tensors that are kept for each byte of compiled code that may be (FUSELINE_CACHE_SIZE; 0 keeps none)."""


def tensor_cache() -> Cache:
    """The cache on disk, below `cache_root()`."""
    return Cache(cache_root() / KIND, SHARE * size_limit())


class TensorStore:
    """Keeps tensors by name and fields; `found` and `kept` count what it gave and what it was given."""

    def __init__(self, cache: Cache | None = None):
        self.cache = tensor_cache() if cache is None else cache
        self.found, self.kept = 0, 0

    def get(self, name: str, fields: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        """The tensors, on the CPU; None where there is no such entry, or a damaged one."""
        from safetensors.torch import load

        entry = self.cache.get(KIND, name, fields)
        if not isinstance(entry, Entry) or FILE not in entry.files:
            return None
        self.found += 1
        return load(entry.files[FILE])

    def put(self, name: str, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps tensors; one that cannot be written costs a warning, and the next process computes it again."""
        from safetensors.torch import save

        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        if self.cache.put(KIND, name, fields, {FILE: save(held)}) is not None:
            self.kept += 1
