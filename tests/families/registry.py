"""Every row of the family table, and where its record is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .decoders import DECODERS, MIXTURES
from .encoders import ENCODERS, PAIRS, SEEN
from .plain import PLAIN
from .rows import Row

ROWS: dict[str, Row] = {row.name: row for row in (*DECODERS, *MIXTURES, *ENCODERS, *PAIRS, *SEEN, *PLAIN)}
RECORDS = Path(__file__).resolve().parents[2] / "docs" / "families.json"


def records() -> dict[str, Any]:
    """What was measured last, as committed."""
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {"rows": {}}
