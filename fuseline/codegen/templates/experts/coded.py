"""Experts of codes in the grouped products: what `tile.py` does where the matrices are words of codes.

Codes of all experts lie in one table, a row of words for each row of each expert's matrix (`formats/words.py`); scales
and zero points lie across, [groups, rows]. Words become values as in the linear template (`coded/values.py`). With few
tokens the sums of a group's codes are scaled, with many the values are: see `coded/kernel.py`.

Codes of pairs are loaded, and their magnitudes decoded, once for both experts (`pairs.py`).
"""

from __future__ import annotations

import torch

from ..coded.scales import number
from ..coded.values import Values
from ..coded.weight import Coded
from ..text import Text, joined, load
from .pairs import BY_SLOT, FIRST, SECOND, CodedPairs, PairValues


class CodedRows:
    """One matrix of codes an expert, or a pair, [height, coded.k]; the product's operand is `name`'s rows of it.

    table: "gate_up" or "down"; count: of experts or pairs; after: whether sums are scaled, where that can be; dual:
    whether the values of both experts of a pair are multiplied.
    """

    def __init__(
        self, table: str, coded: Coded, height: int, count: int, dtype: torch.dtype, after: bool, dual: bool = False
    ):
        self.table, self.coded, self.height, self.dtype, self.dual = table, coded, height, dtype, dual
        self.pairs = isinstance(coded, CodedPairs)
        self.total = height if self.pairs else count * height
        self.values = PairValues(coded, dtype) if self.pairs else Values(coded, dtype)
        grouped = coded.groups > 1 and coded.group % coded.step == 0
        self.after = after and grouped

    def sums(self, name: str) -> tuple[str, ...]:
        """The sums of an operand's products: both experts of a pair have their own."""
        return (name, f"{name}_second") if self.dual else (name,)

    def constants(self, text: Text) -> None:
        """What codes are or-ed into: no compiler knows the sign of the number of tiles."""
        text.add(*self.values.constants("tiles < 0"))
        if self.pairs and self.coded.groups > 1:
            text.add(f"scale_first = group * {(self.coded.groups - 1) * self.height}")
        if isinstance(self.values, PairValues) and not self.dual:
            self.values.slot(text)

    def start(self, text: Text, name: str, row: str, inside: str | None) -> None:
        """Where the words of an operand's rows begin, and what all their channels share."""
        start = self.coded.start(f"{name}_row", f"{name}_row.to(tl.int64)")
        text.add(
            f"{name}_row = group * {self.height} + {row}",
            f"{name}_rows = {self.table}_codes_ptr + ({start})[:, None]",
        )
        if self.coded.zero is not None and self.coded.groups == 1:
            loaded = load(f"{self.table}_zero_ptr + {name}_row", (inside,), "0")
            text.add(f"zero_{name} = {self.values.subtrahend(loaded)}")

    def loop(self, text: Text, names: tuple[str, ...], inside: str | None) -> None:
        coded = self.coded
        masks = joined((inside and f"{inside}[:, None]",))
        masks += ", other=0" if masks else ""
        dots = coded.chunk // coded.step
        if coded.groups > 1:
            self._fetch(text, names, "0", inside)
        with text.block(f"for turn in range({coded.chunks}):"):
            for name in names:
                text.add(*self.values.loads(name, f"{name}_rows", "turn", masks))
            for dot in range(dots):
                text.add(f"k{dot} = {self._first('turn', dot)} + tl.arange(0, {coded.step})")
                live = f"(k{dot} < {coded.k})[:, None]" if coded.k % coded.chunk else None
                text.add(f"x{dot} = {load(f'x_columns + k{dot}[:, None]', ('inside_m[None, :]', live))}")
                if coded.groups > 1:
                    self._scales(text, names, dot)
                    if dot == dots - 1:  # no earlier: registers for both turns' would keep programs from the SM
                        self._fetch(text, names, f"tl.minimum(turn + 1, {coded.chunks - 1})", inside)
                for name in names:
                    self._accumulate(text, name, dot)

    def _first(self, turn: str, dot: int) -> str:
        """The first channel of a dot."""
        start = f"{turn} * {self.coded.chunk}"
        return f"{start} + {dot * self.coded.step}" if dot else start

    def _fetch(self, text: Text, names: tuple[str, ...], turn: str, inside: str | None) -> None:
        """Loads a turn's scales and zero points as they are stored: `scale<dot>_<name>`, `zero<dot>_<name>`.

        Each is [BLOCK_N] or, where a dot's pieces have their own, [BLOCK_N, pieces]. A turn ahead, as in the linear
        template: Triton copies no two bytes a thread by itself.
        """
        coded = self.coded
        text.add(f"ahead = {turn}")
        for dot in range(coded.chunk // coded.step):
            first = "scale_first + " if self.pairs else ""
            text.add(f"scale_row = {first}({coded.group_at(self._first('ahead', dot))}) * {self.total}")
            for name in names:
                at = f"scale_row[None, :] + {name}_row[:, None]" if coded.several else f"scale_row + {name}_row"
                for part, tensor in (("scale", coded.scale), ("zero", coded.zero)):
                    if tensor is not None:
                        loaded = load(f"{self.table}_{part}_ptr + {at}", self._inside(inside), "0")
                        text.add(f"{part}{dot}_{name} = {loaded}")

    def _scales(self, text: Text, names: tuple[str, ...], dot: int) -> None:
        """The scales and zero points of a dot, from what was loaded for it."""
        for name in names:
            scale = f"scale_{name}"
            text.add(f"{scale} = {number(text, scale, f'scale{dot}_{name}', self.coded.scaling)}")
            if self.coded.zero is not None:
                text.add(f"zero_{name} = {self.values.subtrahend(f'zero{dot}_{name}')}")

    def _accumulate(self, text: Text, name: str, dot: int) -> None:
        scale = f"scale_{name}" if self.coded.groups > 1 else None
        zero = f"zero_{name}" if self.coded.zero is not None else None
        sums, before = self.sums(name), None if self.after else scale
        if isinstance(self.values, PairValues):
            whose = (FIRST, SECOND) if self.dual else (BY_SLOT,)
            made = {one: f"w_{total}" for one, total in zip(whose, sums, strict=True)}
            self.values.write_pairs(text, name, dot, before, made)
        else:
            self.values.write(text, name, dot, before, zero)
        precision = ', input_precision="ieee"' if self.dtype == torch.float32 else ""
        for total in sums:
            if self.after:
                text.add(f"{total} += tl.dot(w_{total}, x{dot}{precision}) * {scale}[:, None]")
            else:
                text.add(f"{total} = tl.dot(w_{total}, x{dot}, {total}{precision})")

    def _inside(self, inside: str | None) -> tuple[str | None]:
        return (inside and (f"{inside}[:, None]" if self.coded.several else inside),)

    def finish(self, text: Text, name: str, inside: str | None) -> None:
        """Scales that come last: those that all channels share, and the tensor's."""
        if self.coded.groups == 1:
            loaded = load(f"{self.table}_scale_ptr + {name}_row", (inside,), "0")
            text.add(f"scale_{name} = {number(text, f'scale_{name}', loaded, self.coded.scaling)}")
            text.add(*(f"{total} = {total} * scale_{name}[:, None]" for total in self.sums(name)))
        if self.coded.outer is not None:
            text.add(f"{name} = {name} * tl.load({self.table}_outer_ptr).to(tl.float32)")
