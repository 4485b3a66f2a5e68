"""Experts of codes in the grouped products: what `tile.py` does where the matrices are words of codes.

Codes of all experts lie in one table, a row of words for each row of each expert's matrix (`formats/words.py`); scales
and zero points lie across, [groups, rows]. Words become values as in the linear template (`coded/values.py`). With few
tokens the sums of a group's codes are scaled, with many the values are: see `coded/kernel.py`.
"""

from __future__ import annotations

import torch

from ..coded.scales import number
from ..coded.values import Values
from ..coded.weight import Coded
from ..text import Text, joined, load


class CodedRows:
    """One matrix of codes an expert, [rows, coded.k]; the product's operand is `name`'s rows of it.

    table: "gate_up" or "down"; rows: of all experts together; after: whether sums are scaled, where that can be.
    """

    def __init__(self, table: str, coded: Coded, height: int, rows: int, dtype: torch.dtype, after: bool):
        self.table, self.coded, self.height, self.total, self.dtype = table, coded, height, rows, dtype
        self.values = Values(coded, dtype)
        grouped = coded.groups > 1 and coded.group % coded.step == 0
        self.after = after and grouped

    def constants(self, text: Text) -> None:
        """What codes are or-ed into: no compiler knows the sign of the number of tiles."""
        text.add(*self.values.constants("tiles < 0"))

    def start(self, text: Text, name: str, row: str, inside: str | None) -> None:
        """Where the words of an operand's rows begin, and what all their channels share."""
        start = self.coded.start(f"{name}_row", f"{name}_row.to(tl.int64)")
        text.add(
            f"{name}_row = group * {self.height} + {row}",
            f"{name}_rows = {self.table}_codes_ptr + ({start})[:, None]",
        )
        if self.coded.zero is not None and self.coded.groups == 1:
            text.add(f"zero_{name} = {self._zero(f'{name}_row', inside)}")

    def loop(self, text: Text, names: tuple[str, ...], inside: str | None) -> None:
        coded = self.coded
        masks = joined((inside and f"{inside}[:, None]",))
        masks += ", other=0" if masks else ""
        with text.block(f"for turn in range({coded.chunks}):"):
            for name in names:
                text.add(*self.values.loads(name, f"{name}_rows", "turn", masks))
            for dot in range(coded.chunk // coded.step):
                first = f"turn * {coded.chunk}" + (f" + {dot * coded.step}" if dot else "")
                text.add(f"k{dot} = {first} + tl.arange(0, {coded.step})")
                live = f"(k{dot} < {coded.k})[:, None]" if coded.k % coded.chunk else None
                text.add(f"x{dot} = {load(f'x_columns + k{dot}[:, None]', ('inside_m[None, :]', live))}")
                if coded.groups > 1:
                    self._groups(text, first)
                for name in names:
                    self._accumulate(text, name, dot, inside)

    def _groups(self, text: Text, first: str) -> None:
        """Which group's scales a dot reads: one, or one for each of its pieces."""
        text.add(f"scale_row = ({self.coded.group_at(first)}) * {self.total}")

    def _accumulate(self, text: Text, name: str, dot: int, inside: str | None) -> None:
        scale = zero = None
        if self.coded.groups > 1:
            at = f"scale_row[None, :] + {name}_row[:, None]" if self.coded.several else f"scale_row + {name}_row"
            scale = f"scale_{name}"
            loaded = load(f"{self.table}_scale_ptr + {at}", self._inside(inside), "0")
            text.add(f"{scale} = {number(text, scale, loaded, self.coded.scaling)}")
            if self.coded.zero is not None:
                text.add(f"zero_{name} = {self._zero(at, inside)}")
        if self.coded.zero is not None:
            zero = f"zero_{name}"
        self.values.write(text, name, dot, None if self.after else scale, zero)
        precision = ', input_precision="ieee"' if self.dtype == torch.float32 else ""
        if self.after:
            text.add(f"{name} += tl.dot(w_{name}, x{dot}{precision}) * {scale}[:, None]")
        else:
            text.add(f"{name} = tl.dot(w_{name}, x{dot}, {name}{precision})")

    def _inside(self, inside: str | None) -> tuple[str | None]:
        return (inside and (f"{inside}[:, None]" if self.coded.several else inside),)

    def _zero(self, at: str, inside: str | None) -> str:
        """What `Values.write` subtracts."""
        return self.values.subtrahend(load(f"{self.table}_zero_ptr + {at}", self._inside(inside), "0"))

    def finish(self, text: Text, name: str, inside: str | None) -> None:
        """Scales that come last: those that all channels share, and the tensor's."""
        if self.coded.groups == 1:
            loaded = load(f"{self.table}_scale_ptr + {name}_row", (inside,), "0")
            text.add(f"scale_{name} = {number(text, f'scale_{name}', loaded, self.coded.scaling)}")
            text.add(f"{name} = {name} * scale_{name}[:, None]")
        if self.coded.outer is not None:
            text.add(f"{name} = {name} * tl.load({self.table}_outer_ptr).to(tl.float32)")
