"""How a program reads its parameters: as they are, or only inside what was derived from them."""

from __future__ import annotations

import torch

from .errors import UserError
from .expressions import Expression, Param
from .program import Program
from .weights import STORE, WeightStore


def plain_reads(program: Program) -> dict[str, torch.Tensor]:
    """The parameters and buffers that the graph reads as they are, by name."""
    read = [n.meta["weight"] for n in program.weights()]
    return {e.name: program.sources[e.name].tensor for e in read if isinstance(e, Param)}


def derived_reads(program: Program) -> list[Expression]:
    """The expressions over parameters that the graph reads, each once."""
    read = [n.meta["weight"] for n in program.weights()]
    return list(dict.fromkeys(e for e in read if not isinstance(e, Param) and e.parameters()))


def refuse_dropped(program: Program, store: WeightStore = STORE) -> None:
    """Refuses a graph that reads a dropped parameter as it is: it would compute with NaN.

    Raises:
        UserError: naming the parameters.
    """
    missing = [name for name, tensor in plain_reads(program).items() if store.dropped(tensor)]
    if missing:
        more = [f"and {len(missing) - 1} more: {', '.join(missing[1:4])}"] if missing[1:] else []
        raise UserError(
            f"weight '{missing[0]}' is read as it is, and its values were dropped (keep_originals=False)",
            [*more, "the graphs before it read it only quantized or folded"],
            "load the original model again, and keep its originals or name passes that treat every graph alike",
        )
