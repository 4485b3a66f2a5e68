"""Routed experts by grouped products: a layer of them becomes one op before the sequence is cut.

Grouped products want all rows of an expert side by side, so a model sorts its rows by expert: a sort over positions,
of which no part can be had from a part of the sequence. The layer as a whole works position by position. `raise` knows
that from the layer's shape; where it has not run, its rules for such layers are applied here.
"""

from __future__ import annotations

from ...compiler.program import Program
from ...compiler.rewriter import Rewriter
from ..raising.experts import StackedExperts
from ..raising.gated import GEGLU, GLU, ReGLU, SwiGLU
from ..raising.modes import Modes, WithinMode

GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


def as_one_op(program: Program, rewriter: Rewriter) -> None:
    """Rewrites layers of routed experts, if the program multiplies by groups."""
    if not any(getattr(n.target, "_opname", "") in GROUPED for n in program.graph.nodes):
        return
    modes = Modes(program.graph, program.training)
    rewriter.apply_all(WithinMode(rule, modes) for rule in (SwiGLU(), GEGLU(), ReGLU(), GLU(), StackedExperts()))
