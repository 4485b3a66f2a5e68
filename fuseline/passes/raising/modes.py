"""Where autograd or autocast changes what an op means: no rule reaches across such a border."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ...compiler.pattern import Match
from ...compiler.program import Program
from ...compiler.rewriter import Builder
from ...compiler.rule import Rule

Mode = tuple[bool, bool]  # gradients recorded, autocast on


class Modes:
    """The grad mode and autocast state under which each node runs."""

    def __init__(self, graph: Graph, training: bool):
        self._of: dict[Node, Mode] = {}
        recorded, casting = training, [_around(graph)]
        for node in graph.nodes:
            name = getattr(node.target, "__name__", "")
            if name == "_set_grad_enabled":
                recorded = training and bool(node.args[0])
            elif name == "_enter_autocast":
                casting.append(bool(node.args[2]) if len(node.args) > 2 else True)
            elif name == "_exit_autocast" and len(casting) > 1:
                casting.pop()
            self._of[node] = (recorded, casting[-1])

    def records(self, node: Node) -> bool:
        """Whether autograd records a node."""
        return self._of[node][0]

    def refuse(self, match: Match, casts: bool = True) -> str | None:
        """Why a match must stay; `casts`: whether what replaces it depends on the casts of autocast."""
        modes = {self._of[n] for n in (match.root, *match.nodes) if n in self._of and _computes(n)}
        if casts and any(casting for _, casting in modes):
            return "it runs under torch.autocast, whose casts are not in the graph"
        if len({recorded for recorded, _ in modes}) > 1 or (casts and len(modes) > 1):
            return "part of it runs under torch.no_grad: the whole would get other gradients"
        return None


def _around(graph: Graph) -> bool:
    """Whether autocast was on around the call that is being compiled: no node of the graph says so."""
    values = (n.meta.get("val") for n in graph.nodes)
    devices = {v.device.type for v in values if isinstance(v, torch.Tensor)}
    return any(torch.is_autocast_enabled(d) for d in devices if torch.amp.is_autocast_available(d))


def _computes(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)


class WithinMode(Rule):
    """A rule that also refuses what crosses a border between modes."""

    def __init__(self, rule: Rule, modes: Modes):
        self._rule, self._modes = rule, modes

    @property
    def name(self) -> str:
        return self._rule.name

    @property
    def inner(self) -> Rule:
        return self._rule.inner

    def matches(self, program: Program) -> Iterator[Match]:
        yield from self._rule.matches(program)

    def refuse(self, m: Match) -> str | None:
        return self._modes.refuse(m) or self._rule.refuse(m)

    def after(self, m: Match, new: Builder) -> Node | dict[Node, Node]:
        return self._rule.after(m, new)
