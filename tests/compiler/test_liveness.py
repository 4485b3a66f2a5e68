"""Liveness: the bytes alive over a schedule, against what a run that drops dead values holds on to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Interpreter, Node

import fuseline
from fuseline import Pipeline, Program
from fuseline.compiler.liveness import liveness, tensors
from fuseline.models.decoder import TinyDecoder
from tests.helpers.models import Mlp


class Held(Interpreter):
    """Runs a graph on real values, each freed after its last use. bytes: of the distinct storages held at each node."""

    def __init__(self, module: torch.fx.GraphModule, owned: list[torch.Tensor]):
        super().__init__(module, garbage_collect_values=True)
        self.owned = {t.untyped_storage().data_ptr() for t in owned}
        self.bytes: dict[str, int] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors([*self.env.values(), result])
        }
        self.bytes[n.name] = sum(size for address, size in held.items() if address not in self.owned)
        return result


def held(program: Program, flat: list[Any]) -> dict[str, int]:
    module, expressions = program.lift()
    owned = [*[flat[i] for i in program.arguments], *program.binder(expressions)(flat)]
    run = Held(module, [t for t in owned if isinstance(t, torch.Tensor)])
    with torch.no_grad():
        run.run(*owned)
    return run.bytes


def views(x: torch.Tensor) -> torch.Tensor:
    """A chain of views of one value, two parts of a split, a copy that looks like a view, and a result used twice."""
    a, b = torch.sin(x).view(4, 2, 8).transpose(0, 1).split([3, 1], dim=1)
    c = torch.sin(x).t().reshape(-1)
    return torch.cat([a.reshape(-1), b.reshape(-1), c]) * c.sum()


class Function(torch.nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


CASES = {
    "views": (lambda: Function(views), lambda: (torch.randn(8, 8),)),
    "mlp": (Mlp, lambda: (torch.randn(4, 8),)),
    "decoder": (lambda: TinyDecoder().eval(), lambda: (torch.arange(24).unsqueeze(0),)),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pipeline", [None, "raise{allow_empty}", "quantize{weights=int8,allow_empty}"])
def test_what_is_alive_is_what_a_run_holds(name: str, pipeline: str | None) -> None:
    build, inputs = CASES[name]
    program = fuseline.capture(build(), inputs())
    if pipeline is not None:
        program, _ = Pipeline(pipeline).run(program)
    measured = held(program, list(program.examples))
    found = liveness(program)
    assert len(found.live) == len(program)
    computing = {n.name: live for n, live in zip(program.graph.nodes, found.live) if n.op == "call_function"}
    assert computing == {n: size for n, size in measured.items() if n in computing}
    assert found.peak == max(found.live)


def test_symbolic_sizes_count_at_their_hints() -> None:
    sequence = torch.export.Dim("sequence", min=2, max=512)
    program = fuseline.capture(Mlp(), (torch.randn(24, 8),), dynamic=({0: sequence},))
    fixed = fuseline.capture(Mlp(), (torch.randn(24, 8),))
    assert any(
        isinstance(s, torch.SymInt) for n in program.graph.nodes for t in tensors(n.meta.get("val")) for s in t.shape
    )
    assert liveness(program).peak == liveness(fixed).peak > 0


def test_weights_and_inputs_are_counted_apart() -> None:
    program = fuseline.capture(Mlp(), (torch.randn(4, 8),))
    found = liveness(program)
    assert found.inputs == 4 * 8 * 4
    assert found.weights == sum(p.numel() * 4 for p in Mlp().parameters())


def test_a_region_counts_by_what_it_gives() -> None:
    program = fuseline.capture(Mlp(), (torch.randn(4, 8),))
    fused, _ = Pipeline("raise,fuse").run(program)
    assert any(n.op == "call_module" for n in fused.graph.nodes)
    assert liveness(fused).peak < liveness(program).peak
