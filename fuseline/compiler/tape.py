"""Tape: a joint graph as numbers. Which storages each call reads and allocates, how large they are, what a call costs.

Storages are what memory is made of: a view holds its base's. Sizes are formulas in the program's symbols; a profile of
memory is a matrix of counts, steps × distinct formulas, so that it is computed once and evaluated at any sequence
length by one product.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import sympy
import torch
from torch.fx import Node

from .compat import storages, symbolic_expression
from .compat_joint import is_tangent
from .costs import FREE, Cost, Size, cost, workspace
from .joint import FUSED, forward_nodes
from .machine import Machine
from .ops import Kind
from .program import Program
from .remade import made_of
from .traits import kind
from .views import readers

At = dict[Any, int]
"""Size symbols and their values."""


def value_at(size: Size, at: At) -> float:
    """A formula's number; a symbol that is not given is an error of the caller's."""
    return float(size) if isinstance(size, (int, float)) else float(size.subs(at))


@dataclass
class Storage:
    """What one call allocates: its owner's position, its size's number among the distinct ones, and the node to tag
    (the owner, or the item of its results)."""

    owner: int
    size: int
    node: Node
    reads: list[int] = field(default_factory=list)  # calls that read it, in order


@dataclass
class Tape:
    """nodes: the graph in order; forward: the positions of its calls before the loss, backward: of those after it;
    reads, allocates: storages by position; results: storages that the forward hands out; gradients: the backward."""

    nodes: list[Node]
    forward: list[int]
    backward: list[int]
    reads: list[tuple[int, ...]]
    allocates: list[list[int]]
    holds: list[tuple[int, ...]]
    storages: list[Storage]
    sizes: list[Size]
    costs: list[Cost]
    results: frozenset[int]
    gradients: frozenset[int]
    inputs: list[tuple[int, ...]]  # positions of the nodes that a node reads
    made_of: dict[int, int] = field(default_factory=dict)  # storages that are made again of another behind a wait on it

    @cached_property
    def is_forward(self) -> np.ndarray:
        mask = np.zeros(len(self.nodes), bool)
        mask[self.forward] = True
        return mask

    @cached_property
    def is_size(self) -> np.ndarray:
        """Which nodes are numbers, not tensors."""
        numbers = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
        return np.array([isinstance(n.meta.get("val"), numbers) for n in self.nodes])

    @property
    def symbols(self) -> list[Any]:
        """The size symbols of the formulas, by name."""
        found = {s for size in self.sizes if not isinstance(size, int) for s in size.free_symbols}
        return sorted(found, key=str)

    def size_values(self, at: At) -> np.ndarray:
        """The distinct sizes in bytes."""
        return np.array([value_at(size, at) for size in self.sizes])

    def bytes(self, at: At) -> np.ndarray:
        """Every storage's bytes."""
        return self.size_values(at)[[s.size for s in self.storages]] if self.storages else np.zeros(0)

    def seconds(self, machine: Machine, at: At) -> np.ndarray:
        """What each call takes; equal calls are computed once."""
        known: dict[Cost, float] = {}
        found = np.zeros(len(self.nodes))
        for i, one in enumerate(self.costs):
            if one is not FREE:
                if one not in known:
                    known[one] = one.seconds(machine, lambda size: value_at(size, at))
                found[i] = known[one]
        return found


def tape(program: Program) -> Tape:
    """The tape of a joint program. Where pointwise operations are fused (`FUSED`), a value that only such operations
    read takes no memory: whoever reads it reads what it was made from."""
    nodes = list(program.graph.nodes)
    position = {n: i for i, n in enumerate(nodes)}
    forward = [position[n] for n in forward_nodes(program.module)]
    before = set(forward)
    fused = FUSED in program.state
    holds: list[tuple[int, ...]] = []
    reads: list[tuple[int, ...]] = []
    allocates: list[list[int]] = []
    costs: list[Cost] = []
    inputs: list[tuple[int, ...]] = []
    found: list[Storage] = []
    sizes: dict[Size, int] = {}
    owner_of: dict[int, int] = {}  # the fake storage's identity → ours
    made_from: dict[int, tuple[int, ...]] = {}  # storages of values that are never written out
    known: dict[Any, Cost] = {}
    for i, node in enumerate(nodes):
        inputs.append(tuple(position[n] for n in node.all_input_nodes))
        read = tuple(dict.fromkeys(s for j in inputs[i] for s in holds[j]))
        reads.append(read)
        allocates.append([])
        costs.append(FREE)
        if node.op == "placeholder" and not is_tangent(node) or node.op in ("get_attr", "output"):
            for key in storages(node.meta.get("val")) if node.op != "output" else ():
                owner_of.setdefault(key, -1)
            holds.append(())
            continue
        tensors = [t for t in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor)]
        held: list[int] = []
        virtual = fused and node.op == "call_function" and _is_inlined(node, len(read))
        for which, tensor in enumerate(tensors):
            key = next(iter(storages(tensor)), -1)  # -1: sparse, and nobody's alias
            if key in made_from:
                held += made_from[key]
            elif key in owner_of:
                if owner_of[key] >= 0:
                    held.append(owner_of[key])
            elif virtual:
                made_from[key] = read
                held += read
            elif fused and (written := _written_in_place(node, holds, position)):
                held += written
                owner_of.update(dict.fromkeys([key] if key != -1 else [], written[0]))
            else:
                size = _bytes(tensor)
                number = sizes.setdefault(size, len(sizes))
                found.append(Storage(i, number, _item(node, which)))
                allocates[i].append(len(found) - 1)
                held.append(len(found) - 1)
                if key != -1:
                    owner_of[key] = len(found) - 1
        holds.append(tuple(dict.fromkeys(held)))
        if size := workspace(node):  # nobody reads it: alive during the call
            found.append(Storage(i, sizes.setdefault(size, len(sizes)), node))
            allocates[i].append(len(found) - 1)
        for s in read:
            found[s].reads.append(i)
        if allocates[i] or virtual:
            costs[i] = _cost_once(node, known)
    output = nodes[-1]
    handed = output.args[0]
    results = _results(program, handed, before, position)
    gradients = [n for n in torch.utils._pytree.tree_leaves(handed) if isinstance(n, Node) and n not in results]
    behind = [i for i, n in enumerate(nodes) if n.op == "call_function" and i not in before]
    behind += [i for i, n in enumerate(nodes) if is_tangent(n)]
    return Tape(
        nodes, forward, sorted(behind), reads, allocates, holds, found, list(sizes), costs,
        frozenset(s for n in results for s in holds[position[n]]),
        frozenset(s for n in gradients for s in holds[position[n]]), inputs,
        _made_of([nodes[i] for i in forward], position, allocates, holds) if fused else {},
    )  # fmt: skip


def _made_of(
    forward: Sequence[Node], position: Mapping[Node, int], allocates: Sequence[Sequence[int]],
    holds: Sequence[tuple[int, ...]],
) -> dict[int, int]:  # fmt: skip
    """Storages of the forward that are made of one other."""
    found: dict[int, int] = {}
    for node, one in made_of(forward).items():
        owned, held = allocates[position[node]], holds[position[one]]
        if len(owned) == 1 and len(held) == 1 and owned[0] != held[0]:
            found[owned[0]] = held[0]
    return found


def _results(program: Program, handed: Any, before: set[int], position: dict[Node, int]) -> list[Node]:
    """What the forward hands out: the leading results that do not depend on a gradient."""
    count = program.module.meta.get("fuseline_forward_results")
    leaves = torch.utils._pytree.tree_leaves(handed)
    leading = leaves[:count] if count is not None else leaves
    return [n for n in leading if isinstance(n, Node) and (count is not None or position[n] in before)]


def _cost_once(node: Node, known: dict[Any, Cost]) -> Cost:
    """The cost of a call; calls of one op on values of the same types and with the same constants share it."""
    types = tuple(_type(n.meta.get("val")) for n in node.all_input_nodes)
    constants = str([a for a in node.args if not isinstance(a, Node)]) + str(node.kwargs)
    key = (node.target, types, _type(node.meta.get("val")), constants)
    if key not in known:
        known[key] = cost(node)
    return known[key]


def _type(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(map(symbolic_expression, value.shape)), value.dtype)
    return tuple(map(_type, value)) if isinstance(value, (tuple, list)) else None


def _bytes(tensor: torch.Tensor) -> Size:
    if tensor.layout is not torch.strided:
        return 0
    size = symbolic_expression(tensor.untyped_storage().nbytes())
    return size if isinstance(size, int) else (int(size) if size.is_number else sympy.expand(size))


def _item(node: Node, which: int) -> Node:
    """The node to tag for one of a call's results."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return node
    items = [user for user in node.users if user.target is operator.getitem and user.args[1] == which]
    return items[0] if items else node


def _is_inlined(node: Node, reads: int) -> bool:
    """Whether code generation writes a value into each of its readers instead of to memory: Inductor's rule, by the
    number of storages that it is made from (`realize_reads_threshold`, `realize_acc_reads_threshold`). A residual
    stream's gradient, to which every block adds, would else be made from all of them. What a matrix product is added to
    becomes one call with it."""
    if kind(node) is not Kind.POINTWISE or not node.users or len(node.users) > 4:
        return False
    if reads > (4 if len(node.users) > 1 else 8) or _ends_product(node):
        return False
    return all(u.op == "call_function" and kind(u) in (Kind.POINTWISE, Kind.ROW) for u in readers(node))


_SCATTERS = (
    "index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", "index_add", "scatter", "scatter_add",
)  # fmt: skip


def _written_in_place(node: Node, holds: Sequence[tuple[int, ...]], position: Mapping[Node, int]) -> tuple[int, ...]:
    """The storages of a scatter's first argument, where nobody else reads it: code generation writes into that."""
    if getattr(node.target, "_opname", "") not in _SCATTERS or not isinstance(node.args[0], Node):
        return ()
    into = node.args[0]
    return holds[position[into]] if into.op == "call_function" and len(into.users) == 1 else ()


def _ends_product(node: Node) -> bool:
    """Whether a call adds something to a matrix product that nobody else reads, in one type: aten.addmm, by Inductor's
    pattern."""
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs:
        return False
    products = [n for n in node.all_input_nodes if n.target is torch.ops.aten.mm.default and len(n.users) == 1]
    types = {n.meta["val"].dtype for n in node.all_input_nodes}
    return bool(products) and len(node.all_input_nodes) == 2 and len(types) == 1


@dataclass(frozen=True)
class Profile:
    """Memory over a schedule. steps: positions on the tape, in order of execution; counts: [steps, distinct sizes]."""

    steps: tuple[int, ...]
    counts: np.ndarray

    def at(self, sizes: np.ndarray) -> np.ndarray:
        """Bytes alive at each step, for the values of the distinct sizes."""
        return self.counts @ sizes


@dataclass(frozen=True)
class Execution:
    """A step of training under one choice of saved storages.

    forward, backward: their memory; recomputed: positions of the calls that run again; saved: storages that are in
    fact kept between the two.
    """

    forward: Profile
    backward: Profile
    recomputed: tuple[int, ...]
    saved: frozenset[int]


def execute(tape: Tape, saved: Collection[int], offloaded: Collection[int] = (), lead: int = 0) -> Execution:
    """The schedule that the partition makes of a choice: a recomputed call runs right before its first reader.

    offloaded: those of `saved` that lie in the host's memory from their last reader in the forward until `lead` steps
    before their first in the backward.
    """
    saved, offloaded = set(saved), set(offloaded)
    done: set[int] = set()
    steps: list[int] = []
    ran: list[int] = []
    is_forward, storages_, owner = tape.is_forward, tape.storages, [s.owner for s in tape.storages]
    whole = {i for i in tape.forward if tape.allocates[i] and all(s in saved for s in tape.allocates[i])}
    used: set[int] = set()
    for i in tape.backward:
        pending, burst = list(tape.inputs[i]), []
        while pending:
            j = pending.pop()
            if j in done or not is_forward[j]:
                continue
            done.add(j)
            if j in whole or tape.is_size[j]:  # sizes are kept for nothing
                continue
            item = tape.nodes[j].target is operator.getitem and bool(tape.holds[j])
            if item and all(s in saved for s in tape.holds[j]):
                continue
            burst.append(j)
            pending += tape.inputs[j]
        for j in sorted(burst):
            steps.append(j)
            if tape.costs[j] is not FREE:
                ran.append(j)
            used.update(s for s in tape.reads[j] if s in saved)
        steps.append(i)
        used.update(s for s in tape.reads[i] if s in saved)
    kept = frozenset(used)
    again = {s for j in steps if is_forward[j] for s in tape.allocates[j]} - kept
    # forward
    place = {i: p for p, i in enumerate(tape.forward)}
    length = len(tape.forward)
    changes = np.zeros((length + 1, len(tape.sizes)))
    for s, one in enumerate(storages_):
        if not is_forward[one.owner]:
            continue
        last = max([place[r] for r in one.reads if is_forward[r]], default=place[one.owner])
        if s in tape.results or (s in kept and s not in offloaded):
            last = length - 1
        elif s in offloaded:
            last = min(length - 1, last + lead)
        changes[place[one.owner], one.size] += 1
        changes[last + 1, one.size] -= 1
    ahead = Profile(tuple(tape.forward), np.cumsum(changes[:-1], 0) if length else changes[:-1])
    # backward
    count = len(steps)
    first: dict[int, int] = {}
    final: dict[int, int] = {}
    touched: dict[int, list[int]] = {s: [] for s in tape.made_of}
    for p, i in enumerate(steps):
        for s in (*tape.reads[i], *tape.allocates[i]):
            first.setdefault(s, p)
            final[s] = p
            if s in touched:
                touched[s].append(p)
    changes = np.zeros((count + 1, len(tape.sizes)))
    waits = _waits(tape, steps, kept)
    apart = {
        s: _between(touched[s], waits[x])
        for s, x in tape.made_of.items()
        if s in again and s not in tape.gradients and x in waits
    }
    for s, lives in apart.items():  # what it is made of is there until it is made for the last time
        x = tape.made_of[s]
        final[x] = max(final[x], lives[-1][0])
    for s, end in final.items():
        if s in tape.gradients:
            end = count - 1
        if s in kept:
            begin = max(0, first[s] - lead) if s in offloaded else 0
        elif is_forward[owner[s]] and s not in again:
            begin = 0
        else:
            begin = first[s]
        for born, died in apart.get(s, [(begin, end)]):
            changes[born, storages_[s].size] += 1
            changes[died + 1, storages_[s].size] -= 1
    behind = Profile(tuple(steps), np.cumsum(changes[:-1], 0) if count else changes[:-1])
    return Execution(ahead, behind, tuple(ran), kept)


def _waits(tape: Tape, steps: Sequence[int], kept: Collection[int]) -> dict[int, list[int]]:
    """For each kept storage the steps at which recomputation that reads it begins, or goes on behind a gradient."""
    found: dict[int, list[int]] = {}
    begins = 0
    for p, i in enumerate(steps):
        if not tape.is_forward[i]:
            begins = p + 1
            continue
        for s in tape.reads[i]:
            if s in kept and (s not in found or found[s][-1] < begins):
                found.setdefault(s, []).append(begins)
    return found


def _between(touched: Sequence[int], waits: Sequence[int]) -> list[tuple[int, int]]:
    """The steps from the first to the last of those that touch a value, apart for the times between waits."""
    groups: dict[int, list[int]] = {}
    for p in touched:
        groups.setdefault(bisect.bisect(waits, p), []).append(p)
    return [(found[0], found[-1]) for found in groups.values()]


def peak(execution: Execution, sizes: np.ndarray) -> tuple[float, float]:
    """Bytes at the fullest step of the forward and of the backward."""
    both = [p.at(sizes) for p in (execution.forward, execution.backward)]
    return float(both[0].max(initial=0)), float(both[1].max(initial=0))


def saved_bytes(tape: Tape, chosen: Collection[int], sizes: np.ndarray) -> float:
    """Bytes of a set of storages."""
    return float(sum(sizes[tape.storages[s].size] for s in chosen))
