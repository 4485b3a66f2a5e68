"""What is made of a kept value at little cost is made again behind each wait on it, instead of being held.

A wait (`order.py`) tells a code generator that the kept value changes there. Inductor, which writes a cast of a block's
input into each of its readers, has to store it then, for those behind the wait: the backward of a block's first norm
reads the input in float32, and the norm's result, when all tiles of the block are done. Made again from the value
itself they take no memory meanwhile, and a cast none at all. `tape.execute` counts casts so, and norms as held: what
is read of them besides, a scale for each position, is no kept value there.
"""

from __future__ import annotations

import bisect

from torch.fx import GraphModule, Node

from ...compiler.joint import forward_nodes
from ...compiler.ops import after
from ...compiler.remade import made_of
from ...compiler.views import viewed


def remake(backward: GraphModule) -> None:
    """Has every reader behind a wait read what was recomputed behind it, too, where `made_of` finds how."""
    order = {n: i for i, n in enumerate(backward.graph.nodes)}
    waits: dict[Node, list[int]] = {}
    for node in order:
        if node.target is after.overload:
            waits.setdefault(viewed(node.args[0]), []).append(order[node])  # type: ignore[arg-type]
    sources = made_of(forward_nodes(backward), waits)
    made: dict[tuple[Node, int], Node] = {}
    reading = [(order[u], u, n) for n in sources for u in n.users]
    for place, user, node in sorted(reading, key=lambda one: one[0]):
        before = waits[sources[node]]
        wait = bisect.bisect(before, place)
        if wait > bisect.bisect(before, order[node]):
            user.replace_input_with(node, _made(backward, node, wait, user, sources, made))
    for node in reversed(sources):
        if not node.users:
            backward.graph.erase_node(node)
    backward.recompile()


def _made(
    module: GraphModule,
    node: Node,
    wait: int,
    before: Node,
    sources: dict[Node, Node],
    made: dict[tuple[Node, int], Node],
) -> Node:
    """A call, and those of `sources` that it reads, once more: behind a wait of that number."""
    if (node, wait) not in made:
        again = {n: _made(module, n, wait, before, sources, made) for n in node.all_input_nodes if n in sources}
        with module.graph.inserting_before(before):
            made[node, wait] = module.graph.node_copy(node, lambda n: again.get(n, n))
    return made[node, wait]
