"""Where a verb's tables and its JSON go."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

WIDTH = 80


class Output:
    """Tables on stdout and JSON in a file; with `--json -` JSON on stdout and the tables on stderr."""

    def __init__(self, json_path: str | None):
        self._json_path = json_path
        self.console = Console(stderr=json_path == "-", width=WIDTH, highlight=False, markup=False, soft_wrap=False)

    def line(self, text: str = "") -> None:
        """Prints a line, wrapped between words where it is too long."""
        self.console.print(text)

    def write(self, data: dict[str, Any]) -> None:
        """Writes `data` where `--json` says, if it was given."""
        if self._json_path is None:
            return
        text = json.dumps(finite(data), indent=2, ensure_ascii=False)
        if self._json_path == "-":
            print(text, file=sys.stdout)
        else:
            Path(self._json_path).write_text(text + "\n", encoding="utf-8")


def announce(what: str) -> None:
    """A line on a terminal, where a minute of silence would look like a fault; nothing in a log."""
    if sys.stderr.isatty():
        print(f"{what} …", file=sys.stderr)


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
