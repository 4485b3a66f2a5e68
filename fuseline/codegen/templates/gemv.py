"""The one-row kernel: each program computes a few output columns of one section for one row.

The product is bound by the bytes of the weights, so there are no tensor cores: a program keeps partial sums of
BLOCK_N columns by ELEMENTS stored elements in registers, and reduces them once at the end. The tile has three
dimensions, [columns, pieces, elements of a piece], where a piece never crosses a group: scales are then loaded once a
piece and column, for any group size.
"""

from __future__ import annotations

from ..dependent import MARK
from .anchor import Anchor, Linear, Section
from .config import PIECE_MAX, RowConfig
from .epilogue import Epilogue
from .norms import normalised, scaled, statistics
from .signature import DECORATOR, arguments, branches, by_format, column_offset, signature_line
from .text import Text, load
from .weights import MAGIC_VARIABLE, Weight, power_of_two_divisor

CONSTANTS = ("BLOCK_N", "ELEMENTS", "STAGES")


def row_kernel(anchor: Anchor, name: str, config: RowConfig) -> str:
    """The kernel's source; grid: rows times the sum of ceil(n / BLOCK_N) over the sections."""
    text = Text()
    text.add(DECORATOR, *signature_line(name, arguments(anchor), CONSTANTS))
    with text.indented():
        text.add(
            "row = tl.program_id(0) % M  # neighbours read the same weights",
            "block = tl.program_id(0) // M",
            *(MAGIC_VARIABLE if any(linear.plain.bits for linear in anchor.linears) else ()),
            f"x_row = x_ptr + row.to(tl.int64) * {anchor.k}",
        )
        if anchor.norm is not None and not anchor.norm.rms:
            statistics(text, anchor, tile=False)
        for section, tag, head, first in branches(anchor):
            with text.block(head):
                _section(text, anchor, section, tag, first, config)
    return str(text)


def _section(text: Text, anchor: Anchor, section: Section, tag: str, first: str, config: RowConfig) -> None:
    n, norm = f"n{tag}", anchor.norm
    text.add(f"{n} = {first} * BLOCK_N + tl.arange(0, BLOCK_N)")
    inside = f"inside_n{tag}" if section.n % config.block_n else None
    if inside:
        text.add(f"{inside} = {n} < {section.n}")
    results = {}
    for number, linears in enumerate(by_format(section)):
        takes_squares = norm is not None and norm.rms and number == 0
        product = Product(anchor, linears, f"{tag}_{number}" if number else tag, n, inside, config)
        product.write(text, takes_squares)
        if norm is not None and takes_squares:
            text.add(f"rstd{tag} = tl.rsqrt(tl.sum(tl.sum(squares{tag}, 1), 0) / {anchor.k} + {norm.eps!r})")
        for linear in linears:
            total = f"tl.sum(tl.sum(acc_{anchor.names[linear.node]}, 2), 1)"
            if norm is not None and norm.rms:
                total += f" * rstd{tag}"
            if linear.plain.bits and linear.plain.groups == 1:
                scale = f"{anchor.names[linear.plain.scale]}_ptr + {n}"
                total += f" * {load(scale, (inside,))}.to(tl.float32)"
            results[linear] = total
    text.add(MARK)
    Epilogue(anchor, section, columns=n, inside=inside, rows="row", tile=False, tag=tag).write(text, results)


class Product:
    """The loop over stored elements that linears of one weight format share; it fills `acc_<linear>`.

    n, inside: the kernel's column index and its mask, or None where every column exists.
    """

    def __init__(
        self, anchor: Anchor, linears: list[Linear], tag: str, n: str, inside: str | None, config: RowConfig
    ) -> None:
        self.anchor, self.linears, self.tag, self.n, self.inside = anchor, linears, tag, n, inside
        self.weight = weight = linears[0].plain
        limit = min(PIECE_MAX, config.elements)
        self.grouped = weight.bits > 0 and weight.groups > 1
        self.piece = power_of_two_divisor(weight.run, limit) if self.grouped else limit
        self.total = -(-weight.stored // self.piece)
        self.live = f"live{tag}" if weight.stored % config.elements else None

    def write(self, text: Text, takes_squares: bool) -> None:
        tag, weight, piece, names = self.tag, self.weight, self.piece, self.anchor.names
        pieces = f"ELEMENTS // {piece}"
        for linear in self.linears:
            name = names[linear.node]
            text.add(f"acc_{name} = tl.zeros((BLOCK_N, {pieces}, {piece}), tl.float32)")
            if linear.plain.zero is not None and not self.grouped:
                zero = load(f"{names[linear.plain.zero]}_ptr + {self.n}", (self.inside,), "0")
                text.add(f"zero_{name} = {zero}.to(tl.float32)[:, None, None]")
        if takes_squares:
            text.add(f"squares{tag} = tl.zeros(({pieces}, {piece}), tl.float32)")
        with text.block(f"for first{tag} in tl.range(0, {self.total}, {pieces}, num_stages=STAGES):"):
            text.add(f"piece{tag} = first{tag} + tl.arange(0, {pieces})")
            text.add(f"j{tag} = (piece{tag} * {piece})[:, None] + tl.arange(0, {piece})[None, :]")
            if self.live:
                text.add(f"{self.live} = j{tag} < {weight.stored}")
            k = f"j{tag}"
            if self.grouped:
                text.add(f"group{tag} = piece{tag}" + (f" // {weight.run // piece}" if weight.run > piece else ""))
            if self.grouped and weight.bits == 4:
                k = f"k{tag}"
                text.add(f"{k} = j{tag} + (group{tag} * {weight.run})[:, None]")
            activations = [
                self._activation(text, half, k + (f" + {weight.run}" if half else ""), takes_squares)
                for half in range(weight.halves)
            ]
            for linear in self.linears:
                self._accumulate(text, linear, activations)

    def _activation(self, text: Text, half: int, k: str, takes_squares: bool) -> str:
        """Loads a piece of x for one half of the bytes, normalises it; the high half carries the factor 1/16."""
        name, norm = f"x{self.tag}_{half}", self.anchor.norm
        text.add(f"{name} = {load(f'x_row + {k}', (self.live,))}.to(tl.float32)")
        if takes_squares:
            text.add(f"squares{self.tag} += {name} * {name}")
        if norm is not None:
            applied = (scaled if norm.rms else normalised)(self.anchor, name, k, self.live)
            if applied != name:
                text.add(f"{name} = {applied}")
        if half:
            text.add(f"{name} = {name} * 0.0625")
        return f"{name}[None, :, :]"

    def _accumulate(self, text: Text, linear: Linear, activations: list[str]) -> None:
        weight, name, tag = linear.plain, self.anchor.names[linear.node], self.tag
        masks = (self.inside and f"{self.inside}[:, None, None]", self.live and f"{self.live}[None, :, :]")
        offset = column_offset(self.n, linear)
        pointer = f"{self.anchor.names[weight.tensor]}_ptr + {offset}[:, None, None] + j{tag}[None, :, :]"
        if not weight.bits:
            text.add(f"w_{name} = {load(pointer, masks)}.to(tl.float32)")
            text.add(f"acc_{name} += w_{name} * {activations[0]}")
            return
        text.add(f"codes_{name} = {load(pointer, masks, '0')}")
        text.add(f"codes_{name} = {weight.integer(f'codes_{name}')}")
        if self.grouped:
            self._load_scales(text, weight, name)
        for half in range(weight.halves):
            text.add(f"q{half}_{name} = {weight.decode(f'codes_{name}', half, f'zero_{name}')}")
        terms = " + ".join(f"q{half}_{name} * {x}" for half, x in enumerate(activations))
        text.add(f"acc_{name} += ({terms}) * scale_{name}[:, :, None]" if self.grouped else f"acc_{name} += {terms}")

    def _load_scales(self, text: Text, weight: Weight, name: str) -> None:
        """The scale and zero point of each column and piece."""
        tag, names = self.tag, self.anchor.names
        masks = (self.inside and f"{self.inside}[:, None]", self.live and f"(piece{tag} < {self.total})[None, :]")
        at = f"({self.n} * {weight.groups})[:, None] + group{tag}[None, :]"
        text.add(f"scale_{name} = {load(f'{names[weight.scale]}_ptr + {at}', masks)}.to(tl.float32)")
        if weight.zero is not None:
            zero = load(f"{names[weight.zero]}_ptr + {at}", masks, "0")
            text.add(f"zero_{name} = {zero}.to(tl.float32)[:, :, None]")
