"""Plainer inputs: weights that are ordinary inputs, and one input where two of a type did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ...program import Program
from ...structure import describe_value
from ..search import Search


def weights_to_inputs(search: Search) -> bool:
    """Weights become inputs, all at once or one at a time."""
    weights = search.best.program.weights()
    if not weights:
        return False
    if search.tries("no weights", _as_inputs(search, {n.name for n in weights})):
        return True
    taken = False
    for node in weights if len(weights) > 1 else ():
        taken |= search.tries(f"{node.name} as an input", _as_inputs(search, {node.name}))
    return taken


def merge_inputs(search: Search) -> bool:
    """Two inputs of one type become one."""
    taken = False
    for node in reversed(search.best.program.placeholders):
        for other in search.best.program.placeholders:
            if other.name == node.name or not _mergeable(node, other, search.best.program):
                continue
            if search.tries(f"{other.name} for {node.name}", _merged(search.best.program, node.name, other.name)):
                taken = True
                break
    return taken


def _as_inputs(search: Search, names: set[str]) -> Program:
    program = search.best.program
    values = search.values.of([n for n in program.weights() if n.name in names]) if search.values else {}
    copied = program.copy()
    sources = list(program.sources)
    flat = [program.examples[i] for i in program.arguments] if program.examples is not None else None
    for node in copied.weights():
        if node.name not in names:
            continue
        name, last = node.name, (copied.placeholders or [next(iter(copied.graph.nodes))])[-1]
        inserting = copied.graph.inserting_after if last.op == "placeholder" else copied.graph.inserting_before
        with inserting(last):
            placeholder = copied.graph.placeholder(f"{name}_value")
        placeholder.meta = {k: v for k, v in node.meta.items() if k not in ("weight", "is_weight")}
        node.replace_all_uses_with(placeholder)
        copied.graph.erase_node(node)
        if flat is not None:
            flat.append(values[name])
    return _numbered(copied, sources, flat)


def _merged(program: Program, name: str, other: str) -> Program:
    copied = program.copy()
    inputs = {n.name: n for n in copied.placeholders}
    flat = [program.examples[i] for i in program.arguments] if program.examples is not None else None
    if flat is not None:
        del flat[[n.name for n in copied.placeholders].index(name)]
    inputs[name].replace_all_uses_with(inputs[other])
    copied.graph.erase_node(inputs[name])
    return _numbered(copied, list(program.sources), flat)


def _numbered(program: Program, names: list[str], flat: list[Any] | None) -> Program:
    """The program with its inputs and then its parameters numbered anew; parameters that nothing reads go."""
    used = {p for node in program.weights() for p in node.meta["weight"].parameters()}
    kept = [name for name in names if name in used]
    count = len(program.placeholders)
    if flat is not None:
        assert program.examples is not None
        flat = [*flat, *(program.examples[program.sources[name].index] for name in kept)]
    program.module.recompile()
    return replace(
        program,
        arguments=list(range(count)),
        sources={name: replace(program.sources[name], index=count + i) for i, name in enumerate(kept)},
        examples=flat,
    )


def _mergeable(node: Node, other: Node, program: Program) -> bool:
    first, second = node.meta.get("val"), other.meta.get("val")
    written = node.name in program.mutated or other.name in program.mutated
    return isinstance(first, torch.Tensor) and not written and describe_value(first) == describe_value(second)
