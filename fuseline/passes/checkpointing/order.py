"""Keeping recomputation where it was planned, once a code generator chooses the order of the backward.

What is computed again depends on saved values alone, so nothing but the order of the graph says when. Inductor fuses
what reads the same tensor, and a rotary table is read by all blocks: the gradient of one block's keys and the keys of
the block before become one kernel, and that block's whole recomputation runs, and waits in memory, before the gradients
are done. Gradients of weights wait too, and hold what they are made of, as nothing needs them before the end. Each run
of recomputed calls is therefore made to wait for all gradients before it, and so is what fetches a value from the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from ...compiler.joint import forward_nodes
from ...compiler.liveness import tensors
from ...compiler.ops import after, from_host, to_host
from ...compiler.views import viewed


def keep_order(forward: GraphModule, backward: GraphModule, results: int) -> None:
    """Has each run of recomputed calls in the backward read saved values `after` the gradients before it.

    A value that was saved is one that the forward hands out behind its `results`; parameters and inputs are not. What
    the forward sends to the host stays as it is until the copy is made: its memory is not written to by a later reader.
    """
    saved = _saved(forward, backward, results)
    again = set(forward_nodes(backward))
    made: dict[Node, int] = {}  # gradients that no other has read yet: the waits that each is known to come before
    behind: dict[Node, int] = {}  # of each call and each saved value, the waits that it comes after
    run: list[Node] = []  # what the present run of recomputed calls waits for
    waiting: set[Node] = set()
    number = passed = 0
    for node in list(backward.graph.nodes):
        if node.op != "call_function":
            continue
        read = [viewed(x) for x in node.all_input_nodes]
        if node in again:
            for x in read if made else ():
                if x in saved and x not in waiting:
                    run, passed = (run, passed) if run else _open(made, behind, number)
                    _wait(backward, x, run, node)
                    waiting.add(x)
                    behind[x] = behind.get(x, 0) | passed
        elif tensors(value := node.meta.get("val")) and viewed(node) is node:
            number += bool(run)
            run, waiting = [], set()
            for x in read:
                made.pop(x, None)
            if isinstance(value, torch.Tensor):  # of a call with several results each is one
                made[node] = 0
        behind[node] = 0
        for x in read:
            behind[node] |= behind.get(x, 0)
    for sent in [n for n in forward.graph.nodes if n.target is to_host.overload]:
        _wait(forward, sent.args[0], [sent], sent.next)
    forward.recompile()
    backward.recompile()


def _open(made: dict[Node, int], behind: dict[Node, int], number: int) -> tuple[list[Node], int]:
    """Gradients to wait for, so that all that are made come before the wait of that number: the latest, and of those
    before it what did not come before a wait that the later ones come after. Then that wait and those it comes after,
    a bit each."""
    chosen: list[Node] = []
    passed = 0
    for node in reversed(made):
        if not made[node] & passed:
            chosen.append(node)
            passed |= behind[node]
        made[node] |= 1 << number
    return chosen, passed | 1 << number


def _wait(module: GraphModule, x: Node, others: Sequence[Node], before: Node) -> None:
    """Has what reads x behind `before` wait for the others."""
    with module.graph.inserting_before(before):
        module.graph.call_function(after.overload, (x, list(others))).meta["val"] = None


def _saved(forward: GraphModule, backward: GraphModule, results: int) -> set[Node]:
    """The backward's inputs that the forward computed, and those that have come back from the host."""
    handed = [n for n in list(forward.graph.output_node().args[0])[results:] if isinstance(n, Node)]  # type: ignore[arg-type]
    computed = {
        n.args[0].name if n.target is to_host.overload else n.name  # type: ignore[union-attr]
        for n in handed
        if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)
    }
    inputs = {n for n in backward.graph.nodes if n.op == "placeholder" and n.name in computed}
    return inputs | {n for n in backward.graph.nodes if n.target is from_host.overload}
