"""Compare: how far each node of a rewritten program is from float64, and which rewrite is at fault.

    comparison = compare(program, Pipeline("raise,fuse"))
    comparison.first                    the first node that diverges, with the rewrite that it is charged to
    comparison.nodes, .rewrites, …      everything that was measured

Three programs run side by side: the captured one in float64 (the reference), the captured one in its own precision,
and the rewritten one. Errors are max|Δ| / max|reference|.

- The *error* of a node is that of the rewritten program. Its *noise* is that of the captured program at the node that
  it stands for, or at what this is computed from: what rounding does without the passes. Its *change* is the error of
  the rewritten program in float64.
- The *local* error of a rewrite is that of its computation alone, on the reference's values as inputs, rounded to the
  program's precision; its noise that of the computation it replaced, on the same inputs. So an error made in one layer
  isn't charged to the next. Its *change* is the same in float64, where only another formula makes a difference.

A rewrite diverges

- by its formula, where the change is more than the noise and more than half a unit in the last place, which is what
  rounding the exact result to the program's type may cost;
- by its precision, where the formula is the same and the local error is still more than `FACTOR` times the noise, and
  more than `FACTOR` units in the last place: the noise of a few elements can be small by luck, and one more rounding
  in the middle of a sum is no fault.

A node diverges where its change is more than `FACTOR` times the noise, or its error more than `CUMULATIVE` times: noise
grows down a graph as it likes. That is charged to nobody where a lossy rewrite or one at fault lies upstream; where
none does, the order of execution is at fault, since every computation is right by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..pipeline import Pipeline
from ..plan import Plan
from ..program import Program
from ..reads import refuse_dropped
from .cells import flatten
from .comparison import Comparison
from .correspondence import Correspondence
from .measure import Progress, measure


def compare(
    program: Program,
    pipeline: Pipeline,
    flat: Sequence[Any] | None = None,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Runs a pipeline over a copy of `program` and measures every node and every rewrite of it.

    Args:
        flat: the caller's flat arguments (`program.examples` when None), real tensors.
        progress: told how many of how many nodes are done.

    Raises:
        UserError: there are no inputs, or the program draws random numbers.
    """
    given = inputs_of(program, flat)
    followed = Correspondence()
    pipeline.run(program, [followed], plan=plan)
    comparison = measure(followed.claims, flatten(followed.program), given, progress=progress, stages=followed.stages)
    comparison.summarise([(p.name, p.tier.value) for p in pipeline.passes], followed.claims.rewrites)
    return comparison


def inputs_of(program: Program, flat: Sequence[Any] | None = None) -> list[Any]:
    """The flat arguments to compare on: those that are given, or the captured ones."""
    found = flat if flat is not None else program.examples
    if found is None:
        raise UserError("a comparison needs the values of its inputs, and this program has none", remedy="flat=[…]")
    refuse_dropped(program)
    return list(found)
