"""The state of a search in a file, so that a call that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ....compiler import checkpoint
from .cayley import Cayley

EVERY = 5
"""Steps between two writes."""


class Journal:
    """Matrices that are being learned, and the optimizer's averages of each, in a safetensors file.

    Args:
        path: None keeps no file.
        search: what is being learned; a file of another search is refused.
        leaves: the matrices, by site and label; read into in place.
    """

    def __init__(
        self, path: Path | None, search: str, leaves: Mapping[tuple[str, str], torch.Tensor], optimizer: Cayley
    ):
        self.path, self.search, self.optimizer = path, search, optimizer
        self.leaves = {f"{site}:{label}": leaf for (site, label), leaf in leaves.items()}
        self.known: dict[str, float] = {}

    @torch.no_grad()
    def resume(self) -> int:
        """How many steps were taken before, whose results are read back; 0 without a file.

        Raises:
            UserError: the file is another search's, or damaged.
        """
        if self.path is None or not self.path.exists():
            return 0
        tensors, header = checkpoint.read(self.path, self.search)
        for name, leaf in self.leaves.items():
            leaf.copy_(tensors[name])
            self.optimizer.state[leaf] = {
                "count": int(header["count"]),
                "square": tensors[f"{name}:square"].to(leaf.device),
            }
        self.known = json.loads(header["measured"])
        return int(header["count"])

    def measured(self, name: str, measure: Callable[[], float]) -> float:
        """A number that is measured once a search, not once a call."""
        if name not in self.known:
            self.known[name] = measure()
        return self.known[name]

    def write(self, count: int) -> None:
        """Writes the state after `count` steps, at some of them, all at once or not at all."""
        if self.path is None or count % EVERY:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, leaf in self.leaves.items():
            state = self.optimizer.state[leaf]
            tensors |= {name: leaf, f"{name}:square": state["square"]}
        header = {"count": str(count), "measured": json.dumps(self.known)}
        checkpoint.write(self.path, self.search, tensors, header)

    def close(self) -> None:
        """Removes the file: what was searched for is found."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
