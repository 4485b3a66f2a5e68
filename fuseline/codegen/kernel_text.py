"""A finished tile as the text of a kernel: dead lines dropped, arguments ordered."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .tile import Tile

_ASSIGNED = re.compile(r"\s*([A-Za-z_]\w*) = (.*)")
_WIDTH = 120


def kernel_source(name: str, tile: Tile, constants: Mapping[str, int]) -> tuple[str, dict[str, str]]:
    """(the `@triton.jit` function, its signature): pointers first, then strides, sizes and constants."""
    lines = live(tile.scopes[0].lines)
    used = set(re.findall(r"\w+", "\n".join(lines)))
    signature = {a: kind for a, kind in sorted(tile.signature.items(), key=_order) if a in used}
    signature |= dict.fromkeys(constants, "constexpr")
    # the number of rows types the row index (i32 or i64), so it must stay a value when it is 1
    decorator = '@triton.jit(do_not_specialize=["rows"])' if "rows" in signature else "@triton.jit"
    parameters = [f"{a}: tl.constexpr" if kind == "constexpr" else a for a, kind in signature.items()]
    head = call(f"def {name}(", parameters, "):")
    return "\n".join([decorator, *head, *("    " + line for line in lines)]) + "\n", signature


def opened(source: str, name: str) -> tuple[str, list[str], str]:
    """A kernel's text apart: what stands before its `def`, its parameters as they are written there, its body."""
    before, _, rest = source.partition(f"def {name}(")
    parameters, _, body = rest.partition("):")
    return before, [p.strip() for p in parameters.split(",") if p.strip()], body


def _order(item: tuple[str, str]) -> int:
    name, kind = item
    return 0 if kind.startswith("*") else 1 if "_stride_" in name else 2


def live(lines: list[str]) -> list[str]:
    """The lines that matter: an assignment to a name that no other line mentions is dropped, repeatedly."""
    while True:
        counts: dict[str, int] = {}
        for line in lines:
            for word in set(re.findall(r"[A-Za-z_]\w*", line)):
                counts[word] = counts.get(word, 0) + 1
        kept = [line for line in lines if not ((match := _ASSIGNED.match(line)) and counts[match.group(1)] == 1)]
        if len(kept) == len(lines):
            return lines
        lines = kept


def call(head: str, arguments: list[str], tail: str, indent: str = "") -> list[str]:
    """A call or a definition on one line, or with its arguments on lines of their own where one would be too long."""
    line = f"{indent}{head}{', '.join(arguments)}{tail}"
    if len(line) <= _WIDTH:
        return [line]
    lines, current = [f"{indent}{head}"], ""
    for argument in arguments:
        if current and len(indent) + 4 + len(current) + len(argument) + 2 > _WIDTH:
            lines.append(f"{indent}    {current}")
            current = ""
        current += f"{' ' if current else ''}{argument},"
    return [*lines, f"{indent}    {current}", f"{indent}{tail}"]
