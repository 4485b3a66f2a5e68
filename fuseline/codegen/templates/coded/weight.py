"""A weight of codes as the kernel reads it: `fuseline::decode_words` in a region."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch.fx import Node

from ....compiler.formats import FORMATS, Element
from ....compiler.formats.words import COLUMNS, Words

STEP = 128  # channels that one tl.dot multiplies, at most


@dataclass(frozen=True)
class Coded:
    """tensor: int32 words [n, …] in runs of `run`, or bytes [n, k] where run is 0; scale, zero: [k / group, n]; outer
    [1]. `nodes` are the graph nodes that the kernel replaces (the decoding, casts)."""

    tensor: Node
    k: int
    nodes: frozenset[Node]
    name: str
    group: int
    run: int
    scale: Node
    zero: Node | None = None
    outer: Node | None = None
    apart: bool = False  # whether one tl.dot may not cross groups

    @property
    def element(self) -> Element:
        return FORMATS[self.name].of(self.zero is None)

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.element.bits

    @property
    def scaling(self) -> str:
        """How scales are stored: `real`, `e8m0` or `e4m3`."""
        return FORMATS[self.name].scaling

    @property
    def format(self) -> tuple[object, ...]:
        """Weights of one format can be read by one loop."""
        return (self.name, self.group, self.run, self.zero is None)

    @property
    def groups(self) -> int:
        return self.k // self.group

    @cached_property
    def words(self) -> Words | None:
        return Words(self.bits, self.run) if self.run else None

    @property
    def piece(self) -> int:
        """Neighbouring channels that share a scale wherever they lie: a piece of the words, or a part of a group."""
        if self.run:
            return 2 * self.run
        return STEP if self.groups == 1 else min(self.group & -self.group, STEP)

    @property
    def step(self) -> int:
        """Channels of one tl.dot."""
        most = STEP if self.words is None else min(STEP, self.words.chunk)
        return min(most, self.group & -self.group) if self.apart and self.groups > 1 else most

    @property
    def chunk(self) -> int:
        """Channels of one turn of the loop."""
        return self.step if self.words is None else self.words.chunk

    @property
    def chunks(self) -> int:
        """Turns of the loop over a row."""
        return -(-self.k // self.chunk)

    @property
    def row(self) -> int:
        """Stored elements of a row."""
        return self.k if self.words is None else self.words.row(self.k)

    @property
    def several(self) -> bool:
        """Whether the channels of one tl.dot have several scales."""
        return self.groups > 1 and self.group % self.step != 0

    def start(self, row: str, wide: str) -> str:
        """Where a row begins in the tensor, as kernel text; wide: its number in as many bits as the place needs."""
        if self.words is None:
            return f"{wide} * {self.row}"
        return f"{wide} // {COLUMNS} * {COLUMNS * self.row} + {row} % {COLUMNS} * {self.words.chunk_words}"

    def group_at(self, first: str) -> str:
        """The group of a tl.dot whose first channel this is, or those of its pieces, as kernel text."""
        if self.several:
            first = f"{first} + tl.arange(0, {self.step // self.piece}) * {self.piece}"
        group = f"({first}) // {self.group}"
        return f"tl.minimum({group}, {self.groups - 1})" if self.k % self.chunk else group

    @property
    def row_bytes(self) -> int:
        """Bytes of one output column's weights, scales and zero points."""
        tensors = ((self.tensor, self.row), (self.scale, self.groups), (self.zero, self.groups))
        return sum(node.meta["val"].dtype.itemsize * length for node, length in tensors if node is not None)

    @property
    def title(self) -> str:
        granularity = "channel" if self.groups == 1 else f"g{self.group}"
        return f"{self.name}:{granularity}{'' if self.zero is None else ' with zero points'}"
