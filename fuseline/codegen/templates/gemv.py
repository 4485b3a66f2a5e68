"""The one-row kernel: each program computes a few output columns of one section for one row.

The product is bound by the bytes of the weights, so there are no tensor cores: a program keeps partial sums of
BLOCK_N columns by ELEMENTS stored elements in registers, and reduces them once at the end. The tile has three
dimensions, [columns, pieces, elements of a piece], where a piece never crosses a group: scales are then loaded once a
piece and column, for any group size.
"""

from __future__ import annotations

from .anchor import Anchor, Linear, Norm, Section
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
    text.add(DECORATOR)
    with text.block(signature_line(name, arguments(anchor), CONSTANTS)):
        text.add(
            "row = tl.program_id(0) % M  # neighbours read the same weights",
            "block = tl.program_id(0) // M",
            *(MAGIC_VARIABLE if any(linear.weight.bits for linear in anchor.linears) else ()),
            f"x_row = x_ptr + row.to(tl.int64) * {anchor.k}",
        )
        if anchor.norm is not None and not anchor.norm.rms:
            statistics(text, anchor, tile=False)
        for section, tag, head, first in branches(anchor):
            with text.block(head):
                _section(text, anchor, section, tag, first, config)
    return str(text)


def _section(text: Text, anchor: Anchor, section: Section, tag: str, first: str, config: RowConfig) -> None:
    n = f"n{tag}"
    text.add(f"{n} = ({first}) * BLOCK_N + tl.arange(0, BLOCK_N)")
    ragged = section.n % config.block_n != 0
    inside = f"inside_n{tag}" if ragged else None
    if ragged:
        text.add(f"{inside} = {n} < {section.n}")
    squares = anchor.norm is not None and anchor.norm.rms
    results = {}
    for number, linears in enumerate(by_format(section)):
        loop = f"{tag}_{number}" if number else tag
        _product(text, anchor.norm, linears, loop, n, inside, config, squares and number == 0)
        if squares and number == 0:
            text.add(
                f"rstd{tag} = tl.rsqrt(tl.sum(tl.sum(squares{tag}, 1), 0) / {anchor.k} + {anchor.norm.eps!r})"
            )
        for linear in linears:
            total = f"tl.sum(tl.sum(acc_{linear.node.name}, 2), 1)"
            if squares:
                total += f" * rstd{tag}"
            if linear.weight.bits and linear.weight.groups == 1:
                total += f" * {load(f'{linear.weight.scale.name}_ptr + {n}', (inside,))}.to(tl.float32)"
            results[linear] = total
    Epilogue(anchor, section, columns=n, inside=inside, rows="row", tile=False, tag=tag).write(text, results)


def _product(
    text: Text, norm: Norm | None, linears: list[Linear], tag: str, n: str, inside: str | None, config: RowConfig,
    squares: bool,
) -> None:  # fmt: skip
    """The loop over stored elements, shared by linears of one weight format; fills `acc_<linear>`."""
    weight = linears[0].weight
    limit = min(PIECE_MAX, config.elements)
    grouped = weight.bits and weight.groups > 1
    piece = power_of_two_divisor(weight.run, limit) if grouped else limit
    pieces = f"ELEMENTS // {piece}"
    ragged = weight.stored % config.elements != 0
    live = f"live{tag}" if ragged else None
    for linear in linears:
        text.add(f"acc_{linear.node.name} = tl.zeros((BLOCK_N, {pieces}, {piece}), tl.float32)")
        if linear.weight.zero is not None and not grouped:
            zero = f"{load(f'{linear.weight.zero.name}_ptr + {n}', (inside,), '0')}.to(tl.float32)"
            text.add(f"zero_{linear.node.name} = {zero}[:, None, None]")
    if squares:
        text.add(f"squares{tag} = tl.zeros(({pieces}, {piece}), tl.float32)")
    j, k, piece_index, group = f"j{tag}", f"k{tag}", f"piece{tag}", f"group{tag}"
    total = -(-weight.stored // piece)
    with text.block(f"for first{tag} in tl.range(0, {total}, {pieces}, num_stages=STAGES):"):
        text.add(
            f"{piece_index} = first{tag} + tl.arange(0, {pieces})",
            f"{j} = ({piece_index} * {piece})[:, None] + tl.arange(0, {piece})[None, :]",
        )
        if ragged:
            text.add(f"{live} = {j} < {weight.stored}")
        if grouped:
            text.add(f"{group} = {piece_index} // {weight.run // piece}")
        if weight.bits == 4 and grouped:
            text.add(f"{k} = {j} + ({group} * {weight.run})[:, None]")
        else:
            k = j
        activations = [
            _activation(text, norm, f"x{tag}_{half}", k + (f" + {weight.run}" if half else ""), live, squares, tag, half)
            for half in range(weight.halves)
        ]
        for linear in linears:
            _accumulate(text, linear, activations, tag, n, inside, live, grouped, f"{piece_index} < {total}")


def _activation(
    text: Text, norm: Norm | None, name: str, k: str, live: str | None, squares: bool, tag: str, half: int
) -> str:
    """Loads a piece of x for one half of the bytes, normalises it; the high half carries the factor 1/16."""
    text.add(f"{name} = {load(f'x_row + {k}', (live,))}.to(tl.float32)")
    if squares:
        text.add(f"squares{tag} += {name} * {name}")
    if norm is not None:
        applied = scaled(norm, name, k, live) if norm.rms else normalised(norm, name, k, live)
        if applied != name:
            text.add(f"{name} = {applied}")
    if half:
        text.add(f"{name} = {name} * 0.0625")
    return f"{name}[None, :, :]"


def _accumulate(
    text: Text, linear: Linear, activations: list[str], tag: str, n: str, inside: str | None, live: str | None,
    grouped: bool, piece_inside: str,
) -> None:  # fmt: skip
    weight, name = linear.weight, linear.node.name
    wide = tuple(c and f"{c}{index}" for c, index in ((inside, "[:, None, None]"), (live, "[None, :, :]")))
    pointer = f"{weight.tensor.name}_ptr + {column_offset(n, linear)}[:, None, None] + j{tag}[None, :, :]"
    if not weight.bits:
        text.add(f"w_{name} = {load(pointer, wide)}.to(tl.float32)")
        text.add(f"acc_{name} += w_{name} * {activations[0]}")
        return
    text.add(f"codes_{name} = {load(pointer, wide, '0')}", f"codes_{name} = {weight.integer(f'codes_{name}')}")
    zero = f"zero_{name}" if weight.zero is not None else None
    if grouped:
        narrow = tuple(
            c and f"({c}){index}" for c, index in ((inside, "[:, None]"), (live and piece_inside, "[None, :]"))
        )
        at = f"({n} * {weight.groups})[:, None] + group{tag}[None, :]"
        text.add(f"scale_{name} = {load(f'{weight.scale.name}_ptr + {at}', narrow)}.to(tl.float32)")
        if weight.zero is not None:
            loaded = load(f"{weight.zero.name}_ptr + {at}", narrow, "0")
            text.add(f"{zero} = {loaded}.to(tl.float32)[:, :, None]")
    terms = _terms(weight, f"codes_{name}", zero, activations)
    text.add(f"acc_{name} += ({terms}) * scale_{name}[:, :, None]" if grouped else f"acc_{name} += {terms}")


def _terms(weight: Weight, codes: str, zero: str | None, activations: list[str]) -> str:
    """Codes times activations, over the one or two values of each stored element."""
    return " + ".join(
        f"({weight.decode(codes, half, weight.centre(half, zero))}) * {x}" for half, x in enumerate(activations)
    )
