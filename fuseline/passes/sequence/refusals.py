"""What `sequence-parallel` says when it cannot go on: the op, the user's line, the fact, and the ways out."""

from __future__ import annotations

from torch.fx import Node

from ...compiler.errors import PassError, UserError
from ...compiler.provenance import module_path


class Unplaced(PassError, UserError):
    """A node of which it is unknown what a rank would have to compute."""

    exit_code = 2


def refusal(node: Node, name: str, reason: str, line: str | None) -> Unplaced:
    """The error for a node that meets a shard and has no answer."""
    where = module_path(node)
    return Unplaced(
        f"pass 'sequence-parallel' cannot place the result of {name}: {reason}",
        [f"at {line or 'an unknown line'}{f', in {where}' if where else ''}", f"node: {node.format_node()}"],
        f"sequence-parallel{{gather={name}}} gathers its inputs on every rank there, at the cost of their memory; "
        "or rewrite that line to work position by position",
    )
