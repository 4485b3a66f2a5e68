"""The arguments that both linear kernels share, and how a launch's blocks are divided among the sections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from ..dtypes import pointer_type
from ..kernel import BufferUse
from ..kernel_text import call
from .anchor import Anchor, Linear, Section, value

# A kernel for M = 1 and another for multiples of 16 would only cost compile time; and M has to stay a value that no
# compiler knows (`weights.MAGIC_VARIABLE`).
DECORATOR = '@triton.jit(do_not_specialize=["M"])'


@dataclass(frozen=True)
class Argument:
    """A pointer argument of a kernel and its Triton type."""

    name: str
    type: str


def operands(anchor: Anchor) -> list[Node]:
    """Placeholders that the kernels read besides x, in the order of the region's own."""
    read: set[Node] = set() if anchor.activation is None else {anchor.activation.scale}
    if anchor.norm is not None:
        read |= {n for n in (anchor.norm.weight, anchor.norm.bias) if n is not None}
    for linear in anchor.linears:
        weight = linear.weight
        parts = (weight.tensor, weight.scale, weight.zero, getattr(weight, "outer", None), linear.bias)
        read |= {n for n in parts if n is not None}
    for section in anchor.sections:
        for node in section.pointwise:
            read |= {n for n in node.all_input_nodes if n.op == "placeholder"}
    return [n for n in anchor.placeholders if n in read and n is not anchor.x]


def outputs(anchor: Anchor) -> list[Node]:
    """The tensors that the kernels write, in the order of the sections."""
    return [n for section in anchor.sections for n in section.outputs]


def arguments(anchor: Anchor) -> list[Argument]:
    """Pointers in order: x, the operands, the outputs. The row count `M` follows them."""
    pointers = [Argument("x_ptr", pointer_type(value(anchor.x).dtype))]
    pointers += [Argument(f"{anchor.names[n]}_ptr", pointer_type(value(n).dtype)) for n in operands(anchor)]
    return pointers + [Argument(f"{anchor.names[n]}_out", pointer_type(value(n).dtype)) for n in outputs(anchor)]


def buffers(anchor: Anchor) -> tuple[BufferUse, ...]:
    """What the pointers of `arguments` are."""
    uses = [(n.name, "read") for n in (anchor.x, *operands(anchor))] + [(n.name, "write") for n in outputs(anchor)]
    return tuple(BufferUse(pointer.name, *use) for pointer, use in zip(arguments(anchor), uses, strict=True))


def signature_line(name: str, pointers: list[Argument], constants: tuple[str, ...]) -> list[str]:
    """The kernel's `def`, on as many lines as it needs."""
    names = [p.name for p in pointers] + ["M"] + [f"{c}: tl.constexpr" for c in constants]
    return call(f"def {name}(", names, "):")


def signature(pointers: list[Argument], constants: tuple[str, ...]) -> dict[str, str]:
    return {p.name: p.type for p in pointers} | {"M": "i32"} | dict.fromkeys(constants, "constexpr")


def branches(anchor: Anchor, apart: bool = False) -> Iterator[tuple[Section, str, str | None, str]]:
    """For each section: a suffix for its variables, the branch's head, and its block's number within the section.

    Triton wants variables of one name to have one type in all branches, so each section has its own names. It finds the
    two sides of an `else` places of their own in shared memory, what loops there read ahead and all. apart: branches
    are ifs that follow each other, for products by tiles: those reuse it.
    """
    before: list[str] = []
    for number, section in enumerate(anchor.sections):
        blocks, past = f"tl.cdiv({section.n}, BLOCK_N)", " + ".join(before)
        first = f"(block - {' - '.join(before)})" if before else "block"
        before.append(blocks)
        upto = f"block < {' + '.join(before)}"
        if len(anchor.sections) == 1:
            yield section, "", None, first
        elif apart and number:
            yield section, f"_{number}", f"if (block >= {past}) & ({upto}):", first
        elif number == len(anchor.sections) - 1:
            yield section, f"_{number}", "else:", first
        else:
            yield section, f"_{number}", f"{'elif' if number else 'if'} {upto}:", first


def by_format(section: Section) -> list[list[Linear]]:
    """The section's linears, those of one weight format together: one loop reads them all."""
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for linear in section.linears:
        groups.setdefault(linear.weight.format, []).append(linear)
    return list(groups.values())


def column_offset(n: str, linear: Linear) -> str:
    """Where the stored rows of columns `n` begin; 64-bit where the weight has more than 2^31 elements."""
    wide = linear.n * linear.plain.stored >= 2**31
    return f"({n}{'.to(tl.int64)' if wide else ''} * {linear.plain.stored})"
