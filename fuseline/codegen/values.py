"""What a kernel's text is made of: terms, indices, masks, ranges of columns, scopes, and names."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass, field

from .sizes import Size

ROW = "row"


@dataclass(frozen=True)
class Term:
    """A value or an index in the kernel: its text (a name or a number) and the axes along which it varies.

    An index that counts through several dimensions remembers them in `parts`, so that a view that splits them again
    finds them. `("", ())` where it does not.
    """

    text: str
    axes: frozenset[str] = frozenset()
    parts: tuple[tuple[Term, Size], ...] = ()


ZERO = Term("0")
Index = tuple[Term, ...]
Mask = tuple[Term, ...]


@dataclass
class Range:
    """A run of columns: its axis, length, index variable, the condition that a column exists, and its block.

    parts: where a program takes one row as several tiles [height, width], the index and the condition of each; values
    then have a tile's shape, and what varies by row alone has [1, 1].
    """

    axis: str
    size: Size
    size_text: str
    block: str
    looped: bool
    index: Term
    inside: Term | None
    parts: tuple[tuple[Term, Term | None], ...] = ()
    part: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Blocks:
    """What an op asks of its kernel's launch: rows that a program takes at once, at most and at least, its warps, and
    the most programs, which walk over all rows.

    ahead: each row is read while the one before is worked on.
    """

    rows: int
    least_rows: int
    warps: int
    programs: int
    ahead: bool = False


@dataclass
class Scope:
    """Lines under construction: the kernel's body, or the body of a loop over the columns of `axis`."""

    axis: str | None = None
    lines: list[str] = field(default_factory=list)
    texts: dict[str, Term] = field(default_factory=dict)
    values: dict[object, Term] = field(default_factory=dict)


class Names:
    """Names for the kernel's variables, after the graph's nodes but without their running numbers.

    Layers of a model differ in those numbers only, and equal text is what lets them share one kernel.
    """

    RESERVED = frozenset({"tl", "triton", "float", "range", "pid", *keyword.kwlist})

    def __init__(self) -> None:
        self.taken: set[str] = set(self.RESERVED)

    def new(self, wish: str) -> str:
        base = re.sub(r"\W", "_", wish).strip("_")
        base = re.sub(r"(_\d+)+(?=_|$)", "", base) or "value"
        base = f"v{base}" if base[0].isdigit() else base
        base = base.lower() if base.isupper() else base  # capitals are the kernel's constants
        name, k = base, 1
        while name in self.taken:
            name, k = f"{base}_{k}", k + 1
        self.taken.add(name)
        return name
