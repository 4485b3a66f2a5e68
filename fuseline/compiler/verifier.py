"""Verifier: rules that every program obeys, in rising levels, checked after each pass.

quick: topological order and live arguments, a value on every node, weights that know their expression, dialect ops in
place; full: fake values recomputed from scratch and compared. An error shows a window of the graph and the user's line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch.fx import Graph, Interpreter, Node

from .action import Observer
from .compat import on_fake_values
from .errors import UserError, VerificationError, nearest
from .expressions import Expression
from .framework import Pass
from .program import Program
from .provenance import makers, source_line
from .report import PassReport
from .structure import describe_value

Finding = tuple[Node, str]
LEVELS = ("off", "quick", "full")


def order(program: Program) -> Iterator[Finding]:
    """Arguments are defined before their use, in this graph."""
    seen: set[Node] = set()
    for node in program.graph.nodes:
        for argument in node.all_input_nodes:
            if argument not in seen:
                yield node, f"uses '{argument.name}' before it is defined, or after it was erased"
        seen.add(node)


def values(program: Program) -> Iterator[Finding]:
    """Every node but the output carries a fake value."""
    for node in program.graph.nodes:
        if node.op != "output" and "val" not in node.meta and node.users:
            yield node, "has no meta['val']"


def weights(program: Program) -> Iterator[Finding]:
    """Weight nodes hold an expression over parameters that the program knows."""
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        expression = node.meta.get("weight")
        if not isinstance(expression, Expression):
            if isinstance(node.meta.get("val"), torch.Tensor):
                yield node, "is a tensor without a weight expression"
        else:
            for name in expression.parameters():
                if name not in program.sources:
                    yield node, f"refers to the parameter '{name}', which the program does not have"


def targets(program: Program) -> Iterator[Finding]:
    """Calls are of ATen or dialect ops, of submodules that exist, or of arithmetic on sizes."""
    for node in program.graph.nodes:
        if node.op == "call_module" and not hasattr(program.module, str(node.target)):
            yield node, f"calls the submodule '{node.target}', which does not exist"
        elif node.op == "call_method":
            yield node, f"is a method call '{node.target}', which normal form does not have"


def propagation(program: Program) -> Iterator[Finding]:
    """Recomputed fake values have the recorded shape and dtype."""
    recorded = {n: describe_value(n.meta.get("val")) for n in program.graph.nodes}
    interpreter = _Recompute(program)
    try:
        with on_fake_values(program.fake_mode):
            interpreter.run(*[n.meta["val"] for n in program.placeholders])
    except Exception as error:
        failed = next(n for n in program.graph.nodes if n not in interpreter.found)
        yield failed, f"cannot run on values of the recorded types: {type(error).__name__}: {error}"
    for node, described in interpreter.found.items():
        if node.op in ("call_function", "call_module") and "val" in node.meta and described != recorded[node]:
            yield node, f"is recorded as {recorded[node]} and computes {described}"


class _Recompute(Interpreter):
    def __init__(self, program: Program):
        super().__init__(program.module)
        self.found: dict[Node, str] = {}

    def run_node(self, n: Node) -> object:
        result = n.meta["val"] if n.op == "get_attr" else super().run_node(n)
        self.found[n] = describe_value(result)
        return result


RULES: dict[str, tuple[Callable[[Program], Iterator[Finding]], ...]] = {
    "quick": (order, values, weights, targets),
    "full": (order, values, weights, targets, propagation),
}


def verify(program: Program, level: str = "quick", after: str = "") -> None:
    """Checks a program.

    Raises:
        VerificationError: for the first node that breaks a rule, with the nodes around it.
    """
    for rule in RULES[level]:
        for node, problem in rule(program):
            raise VerificationError(
                f"{f'after {after}: ' if after else ''}'{node.name}' {problem}",
                [
                    *window(program.graph, node),
                    f"rule: {(rule.__doc__ or '').strip()}",
                    f"made by: {' -> '.join(makers(node)) or 'capture'}",
                    f"line: {next(filter(None, map(source_line, (node, *node.users))), 'unknown')}",
                ],
            )


def window(graph: Graph, node: Node, around: int = 3) -> list[str]:
    """The nodes around one, as text, the node itself marked."""
    nodes = list(graph.nodes)
    middle = nodes.index(node)
    shown = nodes[max(0, middle - around) : middle + around + 1]
    return [f"{'>' if n is node else ' '} {n.format_node()}" for n in shown]


class Verify(Observer):
    """Verifies the program after every pass, its time kept apart from the pass's."""

    def __init__(self, level: str = "quick"):
        if level not in RULES:
            raise UserError(f"unknown verification level '{level}'{nearest(level, LEVELS)}")
        self.level = level

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        started = time.perf_counter()
        verify(program, self.level, f"pass '{step.name}'")
        report.verify_ms = (time.perf_counter() - started) * 1e3
