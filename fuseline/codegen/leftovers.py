"""Leftovers: what no region takes, gathered into regions that Inductor may compile.

After `fuse`, convolutions, batch norms, routing and the like run op by op through PyTorch. Here they are grouped into
maximal convex sets without writes in place, random numbers or sizes that depend on data. A pointwise region that lies
among them joins the set, for Inductor fuses it with what it follows: convolution → batch norm → add → relu. In the
emitted module such a set is a function of ATen calls, which can be read and run as it stands; the runtime may put a
compiled one in its place (`runtime/leftovers.py`).
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..compiler.compat import symbolic_expression
from ..compiler.ops import Kind, find
from ..compiler.order import Partition, Reachability, is_barrier, sort, touches_written
from ..compiler.outline import cut
from ..compiler.program import Program
from ..compiler.structure import structural_hash
from ..compiler.traits import CREATIONS, arguments, is_view, overloads

KIND = "inductor"
LEAST = 2  # kernels in a set: one alone has nothing to be fused with
LARGEST = 400  # nodes in a set: Inductor's time grows with them
DISTINCT = 8  # different sets of one program: each is a compilation

#: What Inductor calls a library for, as PyTorch does: the gain lies in what stands around it.
EXTERNAL = overloads("""
    conv1d.default conv2d.default conv3d.default convolution.default conv_transpose2d.input linear.default
    matmul.default mm.default bmm.default addmm.default baddbmm.default scaled_dot_product_attention.default
""")

_UNFIT_TAGS = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}


def gather(program: Program) -> list[str]:
    """Cuts the leftovers of `program`, in place, into regions of kind "inductor"; returns their names."""
    sort(program.graph)
    found = list(_sets(program, Partition(Reachability(program.graph))))
    digests = [identity(cut(program, nodes, KIND).module) for nodes in found]
    kernels: dict[str, int] = {}
    for digest, nodes in zip(digests, found, strict=True):
        kernels[digest] = kernels.get(digest, 0) + sum(_kernels(n) for n in nodes)
    chosen = sorted(kernels, key=kernels.__getitem__, reverse=True)[:DISTINCT]
    names = [_outline(program, nodes, d) for d, nodes in zip(digests, found, strict=True) if d in chosen]
    sort(program.graph)
    program.module.recompile()
    return names


def identity(region: GraphModule) -> str:
    """A digest of all that a compiled region depends on beside its inputs' values: graph, shapes, strides, devices."""
    values = [n.meta.get("val") for n in region.graph.nodes if n.op == "placeholder"]
    layouts = [
        f"{[*map(symbolic_expression, v.stride())]} {v.device}" if isinstance(v, torch.Tensor) else type(v).__name__
        for v in values
    ]
    return hashlib.sha256("\n".join([structural_hash(region), *map(str, layouts)]).encode()).hexdigest()


def _kernels(node: Node) -> int:
    """How many kernels PyTorch, or we, would launch for a node at least: 0 for a view."""
    if node.op == "call_module":
        return 1
    free = is_view(node.target) or node.target in CREATIONS or node.target is operator.getitem
    return 0 if free or not _tensors(node.meta.get("val")) else 1


def _sets(program: Program, partition: Partition) -> Iterator[list[Node]]:
    """Maximal convex sets, grown along the graph: a node joins the sets of all its inputs that it can be joined to."""
    found: dict[Node, set[Node]] = {}  # by the first member
    home: dict[Node, Node] = {}
    for node in program.graph.nodes:
        if not _fits(program, node):
            continue
        members, first = {node}, node
        for source in node.all_input_nodes:
            other = home.get(source)
            if other is None or other is first:
                continue
            joined = members | found[other]
            if len(joined) <= LARGEST and partition.fits(joined, ("leftover", other)):
                if first is not node:  # two sets have become one
                    partition.put(("leftover", first), set())
                    del found[first]
                members, first = joined, other
                partition.put(("leftover", first), members)
                home.update(dict.fromkeys(members, first))
        if first is node and node.target is operator.getitem:
            continue  # a region takes tensors, not tuples of them
        found[first] = members
        home[node] = first
    for members in found.values():
        nodes = sorted(_trimmed(members), key=partition.reach.index.__getitem__)
        if _worth(nodes):
            yield nodes


def _fits(program: Program, node: Node) -> bool:
    """Whether Inductor may have a node: it computes tensors on one device, always the same from the same inputs."""
    if touches_written(node) or is_barrier(node) or node.meta.get("autocast"):
        return False
    tensors = _tensors(node.meta.get("val"))
    if not tensors or len({t.device for t in tensors}) > 1:
        return False
    if any(t.device != tensors[0].device for n in node.all_input_nodes for t in _tensors(n.meta.get("val"))):
        return False
    if node.op == "call_module":
        return program.module.get_submodule(str(node.target)).meta.get("kind") == "pointwise"
    if node.op != "call_function":
        return False
    op = find(node.target)
    if op is not None:
        return op.kind is not Kind.ANCHOR
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.target is operator.getitem
    if arguments(node).get("training") or arguments(node).get("use_input_stats"):  # a norm that moves its statistics
        return False
    if node.target is torch.ops.aten.index.Tensor:  # a mask in the index gives a size that depends on data
        indices = [n.meta["val"].dtype for n in arguments(node)["indices"] if n is not None]
        return torch.bool not in indices and torch.uint8 not in indices
    return node.target.namespace == "aten" and not schema.is_mutable and not _UNFIT_TAGS & set(node.target.tags)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor)]


def _trimmed(members: set[Node]) -> set[Node]:
    """Without the views at the edges: they cost PyTorch nothing, and an output that is an alias of an input is one."""
    members = set(members)
    while True:
        edge = {
            n for n in members
            if n.op == "call_function" and is_view(n.target) and not any(u in members for u in n.users)
        }  # fmt: skip
        if not edge:
            return members
        members -= edge


def _worth(nodes: list[Node]) -> bool:
    """Whether there is something to win: two kernels that could be one, and one of them not in a region of ours."""
    working = [n for n in nodes if _kernels(n)]
    members = set(nodes)
    return (
        len(working) >= LEAST
        and any(n.target not in EXTERNAL for n in working)
        and any(n.op == "call_function" for n in working)
        and all(isinstance(n.meta["val"], torch.Tensor) for n in nodes if not members.issuperset(n.users))
    )


def _outline(program: Program, nodes: list[Node], digest: str) -> str:
    """Puts a call of the region in the place of its last node; returns the region's name."""
    piece, graph = cut(program, nodes, KIND), program.graph
    piece.module.meta["identity"] = digest
    serial = 0
    while hasattr(program.module, name := f"{KIND}_{serial}"):
        serial += 1
    program.module.add_submodule(name, piece.module)
    values = [n.meta["val"] for n in piece.outputs]
    with graph.inserting_after(nodes[-1]):
        call = graph.call_module(name, piece.inputs)
    call.meta["val"] = values[0] if len(values) == 1 else tuple(values)
    results, last = [call], call
    if len(values) > 1:
        results = []
        for i, value in enumerate(values):
            with graph.inserting_after(last):
                last = graph.call_function(operator.getitem, (call, i))
            last.meta["val"] = value
            results.append(last)
    for old, new in zip(piece.outputs, results, strict=True):
        old.replace_all_uses_with(new)
    for node in reversed(nodes):
        graph.erase_node(node)
    return name
