"""The page: one HTML file with its data, its style and its scripts inside; it loads nothing."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

_SCRIPTS = (
    "model",
    "place",
    "draw",
    "graph",
    "mouse",
    "details",
    "timeline",
    "figures",
    "tables",
    "code",
    "search",
    "main",
)
"""In the order in which they are put into the page; each stands on those before it."""


def asset(name: str) -> str:
    """A file that the page is made of."""
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def render(data: Mapping[str, Any]) -> str:
    """The page about `page_data`'s result, as text."""
    scripts = "\n".join(asset(f"{name}.js") for name in _SCRIPTS)
    parts = {
        "title": html.escape(str(data["title"])),
        "style": asset("page.css"),
        "data": embedded(data),
        "script": f'"use strict";\n(() => {{\n{scripts}\n}})();',
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset("page.html"))


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a `<script>` element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
