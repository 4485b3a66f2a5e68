"""Small programs through `raise`: traced, raised, compared; and refusals with what forcing them would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fuseline.compiler.errors import FuselineError
from fuseline.compiler.framework import Pass
from fuseline.compiler.observe.numerics import error
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.program import Program
from fuseline.compiler.report import PassReport
from fuseline.compiler.rule import Rule
from fuseline.passes.raising import Raise

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
DIALECT = torch.ops.fuseline


def rand(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64).to(dtype)


def traced(function: Callable[..., Any], *inputs: torch.Tensor) -> Program:
    return Program.from_fx(make_fx(function, pre_dispatch=True)(*inputs), inputs)


def run(program: Program) -> torch.Tensor:
    torch.manual_seed(0)
    outputs = program.run(program.examples)
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def calls(program: Program) -> list[Any]:
    """The dialect ops of a program, as (name, arguments that are no tensors)."""
    return [
        (n.target._opname, tuple(a for a in n.args if not isinstance(a, torch.fx.Node)))
        for n in program.graph.nodes
        if getattr(n.target, "namespace", "") == "fuseline"
    ]


def raised(function: Callable[..., Any], *inputs: torch.Tensor, bound: float = 1e-12) -> tuple[Program, PassReport]:
    program = traced(function, *inputs)
    after, report = Pipeline("raise{allow_empty}").run(program, verification="full")
    assert error(run(after), run(program)) <= bound
    return after, report["raise"]


class Unguarded(Rule):
    """A rule whose guards are off."""

    def __init__(self, rule: Rule):
        self.rule = rule

    @property
    def name(self) -> str:
        return self.rule.name

    def matches(self, program: Program) -> Any:
        yield from self.rule.matches(program)

    def after(self, m: Any, new: Any) -> Any:
        return self.rule.after(m, new)


@dataclass(frozen=True)
class Force(Pass):
    """`raise` without refusals."""

    name = "force"

    def rules(self, program: Program) -> Any:
        return [Unguarded(rule.inner) for rule in Raise().rules(program) if rule.name != "CausalCall"]


def refused(reason: str, function: Callable[..., Any], *inputs: torch.Tensor) -> Program:
    """The captured program, after a check that its site is refused for that reason and stays as it was."""
    program = traced(function, *inputs)
    after, report = Pipeline("raise{allow_empty}").run(program)
    assert reason in report["raise"].refused.values(), report["raise"].refused
    assert error(run(after), run(program)) == 0
    return program


def refused_rightly(reason: str, function: Callable[..., Any], *inputs: torch.Tensor) -> None:
    """Refused; and rewriting all the same would change the result."""
    program = refused(reason, function, *inputs)
    forced, _ = Pipeline([Force()]).run(program, verification="off")
    assert error(run(forced), run(program)) > 1e-3


def impossible(reason: str, function: Callable[..., Any], *inputs: torch.Tensor) -> None:
    """Refused; and rewriting all the same gives another type, or no result at all."""
    program = refused(reason, function, *inputs)
    with pytest.raises((FuselineError, RuntimeError)):
        run(Pipeline([Force()]).run(program, verification="off")[0])
