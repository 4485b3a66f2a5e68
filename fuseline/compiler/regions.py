"""Regions of `torch.utils.checkpoint` that the user wrote: which nodes lie in one, and what it says of them.

A region's body is traced in line; its number goes along under `meta["custom"]`, which survives retracing and
AOTAutograd, so that the joint graph still knows it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, GraphModule, Node

from .compat_joint import checkpoint_policy, saves
from .errors import CaptureError

_KEY = "fuseline_region"
_numbers = itertools.count(1)
_policies: dict[int, Callable[..., Any]] = {}


def mark_region(body: GraphModule) -> None:
    """Marks the nodes of a region's body; those of a region inside it are marked by their own."""
    try:
        policy = checkpoint_policy(body)
    except ValueError as error:
        raise CaptureError(
            f"a region of torch.utils.checkpoint cannot be compiled: {error}",
            remedy="use functools.partial(create_selective_checkpoint_contexts, policy) as context_fn",
        ) from None
    region = next(_numbers)
    if policy is not None:
        _policies[region] = policy
    for node in body.graph.nodes:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), _KEY: region}


def region_of(node: Node) -> int | None:
    """The number of the region that a node lies in."""
    found = (node.meta.get("custom") or {}).get(_KEY)
    return found if isinstance(found, int) else None


def has_regions(graph: Graph) -> bool:
    """Whether some node lies in a region."""
    return any(region_of(node) is not None for node in graph.nodes)


def region_saves(node: Node) -> bool | None:
    """Whether the region that a forward node lies in keeps its value; None outside of all regions."""
    region = region_of(node)
    if region is None:
        return None
    policy = _policies.get(region)
    if policy is None or node.op != "call_function":
        return False
    values = lambda a: a.meta.get("val") if isinstance(a, Node) else a
    args = [values(a) for a in node.args]
    return saves(policy(node.target, *args, **{k: values(v) for k, v in node.kwargs.items()}))
