"""Report: what a pipeline did, pass by pass, as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PassReport:
    """One pass: how many sites it rewrote, by rule; which it refused and why; what it cost.

    ms: time of the pass itself; verify_ms: of the checks after it; error: max|Δ|/max|reference| of the program's
    outputs against the captured graph in higher precision, when numerics were asked for.
    """

    name: str
    text: str
    tier: str
    ms: float = 0.0
    verify_ms: float = 0.0
    matched: int = 0
    rules: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    nodes_before: int = 0
    nodes_after: int = 0
    error: float | None = None

    def reasons(self) -> list[tuple[int, str]]:
        """Refusals grouped by reason, the most frequent first."""
        return [(count, reason) for reason, count in Counter(self.refused.values()).most_common()]


@dataclass
class Report:
    """What a pipeline did to one program."""

    pipeline: str
    passes: list[PassReport] = field(default_factory=list)
    rewrites: int = 0
    captured_error: float | None = None  # rounding noise of the captured graph itself, against higher precision

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __getitem__(self, name: str) -> PassReport:
        return next(p for p in self.passes if p.name == name)
