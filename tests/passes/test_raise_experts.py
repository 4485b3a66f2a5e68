"""`raise` on routed experts: in one tensor, in modules of their own, and what it must not touch."""

from __future__ import annotations

import pytest
import torch

import fuseline
from fuseline.compiler import ops
from fuseline.compiler.observe.numerics import error
from tests.helpers.mixtures import FAMILIES, Separate, build, tokens
from tests.passes.raise_helpers import raised, refused


def layers(program) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.target is ops.moe.overload]


@torch.no_grad()
@pytest.mark.one_in(2)
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_in_one_tensor(family: str, implementation: str) -> None:
    model = build(family, implementation)
    program, _ = fuseline.Pipeline("raise").run(fuseline.capture(model, (tokens(),)), verification="full")
    (layer,) = layers(program)
    left = {getattr(n.target, "_opname", "") for n in program.graph.nodes}
    assert not left & {"bmm", "_grouped_mm", "grouped_mm_fallback", "sort", "histc", "index_put"}
    kind = ("clamped_swiglu", True, 1.702, 7.0) if family == "GptOss" else ("silu", False, 1.702, 7.0)
    assert tuple(layer.args[7:]) == kind
    assert error(program.run(program.examples)[0], build(family, "eager")(tokens()).logits) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_left_apart_are_rotated_online(implementation: str) -> None:
    model = build("Mixtral", implementation)
    pipeline = fuseline.Pipeline("raise{experts=false},rotate{r4}")
    program, report = pipeline.run(fuseline.capture(model, (tokens(),)), verification="full")
    assert not layers(program) and not report["rotate"].refused
    assert sum(n.target is ops.hadamard.overload for n in program.graph.nodes) == model.config.num_hidden_layers
    assert error(program.run(program.examples)[0], build("Mixtral", "eager")(tokens()).logits) < 1e-6


@pytest.mark.one_in(4)
@pytest.mark.parametrize("form", ["dense", "scattered", "where", "gathered"])
@pytest.mark.parametrize(("joint", "bias", "shared"), [(False, False, False), (True, True, False), (False, True, True)])
def test_experts_in_modules(form: str, joint: bool, bias: bool, shared: bool) -> None:
    model = Separate(form, joint, bias, shared).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    program, _ = fuseline.Pipeline("raise").run(fuseline.capture(model, (x,)), verification="full")
    assert len(layers(program)) == 1
    linears = sum(n.target is torch.ops.aten.linear.default for n in program.graph.nodes)
    assert linears == 1 + shared * (2 if joint else 3)  # the router's, and the shared expert's own
    assert error(program.run(program.examples)[0], model(x)) < 1e-12


def test_tokens_of_two_dimensions() -> None:
    model, x = Separate("dense").double(), torch.randn(2, 5, 8, dtype=torch.float64)
    program, _ = fuseline.Pipeline("raise").run(fuseline.capture(model, (x,)), verification="full")
    assert len(layers(program)) == 1
    assert error(program.run(program.examples)[0], model(x)) < 1e-12


def test_a_training_step_through_modules() -> None:
    model, x = Separate("dense", shared=True).double(), torch.randn(5, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compiler.reset()
    fuseline.optimize(model, "raise", fullgraph=True)
    model(x).square().sum().backward()
    (one,) = fuseline.reports(model)
    assert len(layers(one.program)) == 1
    assert max(error(p.grad, expected[name]) for name, p in model.named_parameters()) < 1e-12


def pieces(experts: int = 4, width: int = 6) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)
    return rand(5, 8), rand(5, experts), rand(experts, 2 * width, 8), rand(experts, 8, width)


def batched(x, ids, weights, gate_up, down, swap=False):
    """As transformers writes it; swap: the gated unit's halves exchanged."""
    rows, flat = x.repeat_interleave(2, 0), ids.reshape(-1)
    gate, up = torch.bmm(gate_up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    gate, up = (up, gate) if swap else (gate, up)
    y = torch.bmm(down[flat], (torch.nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1).unsqueeze(-1)).view(5, 2, 8).sum(1)


def test_numbers_from_a_topk_over_the_experts_are_proved() -> None:
    x, odds, gate_up, down = pieces()
    program, report = raised(lambda *t: batched(t[0], t[1].topk(2, -1)[1], t[1].topk(2, -1)[0], *t[2:]), *pieces())
    assert len(layers(program)) == 1 and report.rules["StackedExperts"] == 1


def test_numbers_that_may_lie_outside_are_refused() -> None:
    def mixture(x, odds, gate_up, down):
        weights, ids = odds.topk(2, -1)
        return batched(x, ids + 1 - 1, weights, gate_up, down)

    refused("the experts' numbers are not proved to lie in 0 … 3: they come from no topk over them", mixture, *pieces())


def test_a_topk_over_more_than_the_experts_is_refused() -> None:
    def mixture(x, odds, gate_up, down):
        weights, ids = odds.topk(2, -1)
        return batched(x, ids, weights, gate_up[:4], down[:4])

    x, _, gate_up, down = pieces()
    odds = torch.tensor([[3.0, 2, 1, 0, -1, -2]], dtype=torch.float64).expand(5, 6)
    reason = "the experts' numbers are not proved to lie in 0 … 3: they come from no topk over them"
    refused(reason, mixture, x, odds.contiguous(), gate_up, down)


def test_ups_before_gates_stay() -> None:
    def mixture(x, odds, gate_up, down):
        weights, ids = odds.topk(2, -1)
        return batched(x, ids, weights, gate_up, down, swap=True)

    program, report = raised(mixture, *pieces())
    assert not layers(program) and "StackedExperts" not in report.rules


def test_experts_that_differ_stay() -> None:
    class Odd(Separate):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, indices = torch.softmax(self.router(x), -1).topk(2, -1)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                y = expert(x + 1) if e == 1 else expert(x)
                out = out + y * (weights * (indices == e)).sum(-1, keepdim=True)
            return out

    model, x = Odd("dense").double(), torch.randn(5, 8, dtype=torch.float64)
    program, _ = fuseline.Pipeline("raise{allow_empty}").run(fuseline.capture(model, (x,)))
    assert not layers(program)
    assert error(program.run(program.examples)[0], model(x)) < 1e-12


def test_an_expert_less_than_the_router_chooses_from_is_refused() -> None:
    model, x = Separate("dense").double(), torch.randn(5, 8, dtype=torch.float64)
    model.experts = model.experts[:2]
    program, report = fuseline.Pipeline("raise{allow_empty}").run(fuseline.capture(model, (x,)))
    assert not layers(program)
    assert any("an expert may be missing here" in reason for reason in report["raise"].refused.values())
    assert error(program.run(program.examples)[0], model(x)) < 1e-12


def test_all_families_are_listed() -> None:
    assert len(FAMILIES) == 7
