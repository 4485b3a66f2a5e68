"""Models that Dynamo captures in parts: what a part without attention is, and where a break cannot be."""

from __future__ import annotations

import logging

from torch.fx import Node

from ...compiler import compat_distributed
from ...compiler.errors import UserError
from ...compiler.program import Program
from ...compiler.provenance import source_line

log = logging.getLogger("fuseline")
REMEDY = "keep that line out of the model's forward, or put it under torch.compiler.disable behind the last layer"
_told: list[bool] = []
_open: list[str] = []  # the break behind which the last graph that was cut goes on


def cut(program: Program) -> None:
    """Notes that a graph was cut, and where the model goes on if it does."""
    _open.clear()
    if program.ends_at:
        _open.append(program.ends_at)
        log.warning(
            "sequence-parallel: the graph ends at %s; what the rest of the model reads is gathered on every rank",
            program.ends_at,
        )


def goes_on(program: Program) -> bool:
    """Whether a graph without attention is the rest of a model that was cut before: its inputs are whole, so every rank
    computes the same, and the gradients that it hands back are those of whole values."""
    return bool(_open) and program.ends_at is None


def between_blocks(program: Program) -> str | None:
    """Why a graph without attention may stay as it is where `fully_shard` gathers each block by itself: its hooks end
    Dynamo's graph at each block, and what lies between them works on whole values on every rank."""
    if not compat_distributed.sharded_by_block():
        return None
    return "fully_shard gathers each block by itself, and this graph lies between blocks"


def tell_of_blocks() -> None:
    """Says once what sharding block by block costs."""
    if compat_distributed.sharded_by_block() and not _told:
        _told.append(True)
        log.warning(
            "sequence-parallel: fully_shard gathers each block by itself, so the graph ends at each block and hidden "
            "states are gathered on every rank between them; fully_shard(model) alone, after model.compile, keeps them "
            "cut from the first layer to the loss"
        )


def named(program: Program) -> list[str]:
    """The line at which this graph ends before its time."""
    return [f"the graph ends at {program.ends_at}"] if program.ends_at else []


def inside_attention(program: Program, attention: Node) -> UserError:
    """The error for attention whose queries and keys come from another graph."""
    return UserError(
        "pass 'sequence-parallel' finds no sequence to cut: queries and keys come into this graph from outside",
        [f"attention at {source_line(attention) or 'an unknown line'}",
         f"a graph break lies inside its block{f': {_open[0]}' if _open else ''}", *named(program)],
        REMEDY,
    )  # fmt: skip
