"""How much a rank sends: counted from a graph, and in closed form.

Ulysses, one attention, one direction (backward sends the same again), in elements, for batch B, block S/P, query heads
H over K key heads of width D on P ranks:

    (P − 1) · B · S/P · D · (h + 2k)    queries, keys and values: to each other rank h query and k key heads
    (P − 1) · B · S/P · D · h           the result

A ring of n members, each of S/n positions:

    (n − 1) · B · S/n · D · 2k          keys and values, to the next member n − 1 times

with h = ⌈H/P⌉, and k the key heads that a rank's queries read. Where the numbers divide that is B · S/P · D · (2H + 2K)
· (P − 1)/P: what a rank sends does not grow with P as long as S/P stays. Source: DeepSpeed-Ulysses (Jacobs et al.,
2023), section 3.2.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.fx import Graph

from .heads import Heads

_SENDS = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")


def exchanged(batch: Any, block: Any, heads: int, keys: int, width: int, degree: int) -> Any:
    """Elements that a rank sends to others in the forward pass of one attention."""
    share = Heads(heads, keys, degree)
    return (degree - 1) * batch * block * width * (2 * share.local + 2 * share.local_keys)


def around(batch: Any, member: Any, keys: int, width: int, ring: int) -> Any:
    """Elements that a rank sends in the forward pass of one attention around a ring, of `member` positions and `keys`
    key heads a member."""
    return (ring - 1) * batch * member * width * 2 * keys


def sent(graph: Graph) -> Counter[str]:
    """Elements that a rank sends to others, by collective, counted from the values in a graph.

    An all-to-all keeps one row of as many as there are ranks; an all-gather sends its input to all others; a
    reduce-scatter keeps one part of its input. A ring counts as `ring_attention`.
    """
    found: Counter[str] = Counter()
    for node in graph.nodes:
        name = getattr(node.target, "_opname", "")
        if name == "ring_attention":
            key, value, degree = node.args[1], node.args[2], node.args[-2]
            found[name] += (key.meta["val"].numel() + value.meta["val"].numel()) * (degree - 1)
        if name not in _SENDS or "c10d_functional" not in node.target.namespace:
            continue
        value = node.args[0].meta["val"]
        if name == "all_to_all_single":
            found[name] += value.numel() // value.shape[0] * (value.shape[0] - 1)
        elif name == "all_gather_into_tensor":
            found[name] += value.numel() * (node.args[1] - 1)
        elif name == "reduce_scatter_tensor":
            found[name] += value.numel() // node.args[2] * (node.args[2] - 1)
        else:
            found[name] += value.numel()
    return found
