"""What was decided so far, in a file: a call that was stopped decides the rest."""

from __future__ import annotations

import json
import time
from pathlib import Path

from ...compiler import checkpoint
from ...compiler.plan import SitePlan

EVERY = 60.0
"""Seconds between two writes; each writes all there is."""


class Journal:
    """Decisions by site. path: None keeps no file; search: what is decided, a file of something else is refused."""

    def __init__(self, path: Path | None, search: str):
        self.path, self.search = path, search
        self.decisions: dict[str, SitePlan] = {}
        self.written = time.monotonic()
        if path is not None and path.exists():
            tensors, header = checkpoint.read(path, search)
            self.decisions = {site: SitePlan(structure) for site, structure in json.loads(header["sites"]).items()}
            for key, tensor in tensors.items():
                site, _, name = key.rpartition(":")
                self.decisions[site].tensors[name] = tensor

    def add(self, site: str, decision: SitePlan) -> None:
        """Keeps a decision, and writes the file when the last time is long ago."""
        self.decisions[site] = decision
        if time.monotonic() - self.written >= EVERY:
            self.write()

    def write(self) -> None:
        """Writes the file now."""
        if self.path is None:
            return
        tensors = {f"{site}:{name}": t for site, one in self.decisions.items() for name, t in one.tensors.items()}
        sites = {site: one.structure for site, one in self.decisions.items()}
        checkpoint.write(self.path, self.search, tensors, {"sites": json.dumps(sites)})
        self.written = time.monotonic()

    def close(self) -> None:
        """Removes the file: all is decided."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
