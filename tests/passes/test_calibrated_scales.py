"""awq and smooth: factors of input channels, folded exactly where that is proved, searched never to the worse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import fuseline
from fuseline import Pipeline
from fuseline.compiler.plan import Plan, SitePlan
from fuseline.compiler.program import Program
from fuseline.compiler.rewriter import Rewriter
from fuseline.compiler.schemes import Scheme
from fuseline.passes import Quantize
from fuseline.passes.calibrated.inputs import Moments
from fuseline.passes.calibrated.methods import Method
from fuseline.passes.calibrated.scales import cost, factors, fold_scales, search, smooth
from tests.helpers.models import error
from tests.passes.rotated_models import VOCABULARY, Decoder, Shape, shapes

AWQ = Quantize(weights="int4:g4", method=Method.AWQ, allow_empty=True)


def ids(count: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count, 10), generator=torch.Generator().manual_seed(0))


def captured(model: nn.Module, *args: torch.Tensor) -> Program:
    with torch.no_grad():
        return Pipeline("raise{allow_empty}").run(fuseline.capture(model, args))[0]


def folded(program: Program, seed: int = 0) -> tuple[Program, Rewriter]:
    """The program with random factors from 1/8 to 8 wherever they fold, and nothing rounded."""
    draw, program = torch.Generator().manual_seed(seed), program.copy()
    rewriter = Rewriter(program, "quantize")
    width = {rewriter.site(site.node): site.shape[1] for site in AWQ.admitted(program)}
    random = lambda n: torch.exp2(6 * torch.rand(n, generator=draw, dtype=torch.float64) - 3)
    rewriter.decisions = {site: SitePlan({}, {"scale": random(n)}) for site, n in width.items()}
    fold_scales(AWQ, program, rewriter)
    return program, rewriter


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(shapes, st.integers(0, 99))
def test_folding_is_exact(shape: Shape, seed: int) -> None:
    program = captured(Decoder(shape, seed), ids())
    after, _ = folded(program, seed)
    with torch.no_grad():
        assert error(after.run(program.examples)[0], program.run(program.examples)[0]) < 1e-12


@pytest.mark.parametrize("norm", ["rms", "unit", "layer"])
@pytest.mark.parametrize("bias", [False, True])
def test_where_factors_fold(norm: str, bias: bool) -> None:
    program = captured(Decoder(Shape(norm=norm, bias=bias, layers=1)), ids())
    after, rewriter = folded(program)
    assert rewriter.matched == {"scales": 3}  # q, k and v; gate and up; down, through up's rows
    assert [site for site in rewriter.refused if "scales" in site] == list(rewriter.refused)
    assert all("which no scale passes" in reason for reason in rewriter.refused.values())  # o, behind attention
    with torch.no_grad():
        assert error(after.run(program.examples)[0], program.run(program.examples)[0]) < 1e-12


class Shared(nn.Module):
    """A norm that something else reads, and a product whose rows two others read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y = self.first(h) + h
        return self.third(torch.relu(self.second(y)))


def test_where_they_do_not_fold() -> None:
    model, x = Shared().double(), torch.randn(5, 8, dtype=torch.float64)
    program = captured(model, x)
    after, rewriter = folded(program)
    assert rewriter.matched == {"scales": 1}  # through relu, into second's rows
    reasons = list(rewriter.refused.values())
    assert len(reasons) == 2 and "is read by add" in reasons[0] and "which no scale passes" in reasons[1]
    assert error(after.run(program.examples)[0], program.run(program.examples)[0]) < 1e-12


def test_a_tied_or_trained_weight_takes_no_factors() -> None:
    model = Decoder(Shape(layers=1, tied=True))
    program = captured(model, ids())
    step = Quantize(weights="int4:g4", method=Method.AWQ, only=("*",))
    rewriter = Rewriter(program, "quantize")
    rewriter.decisions = {
        rewriter.site(site.node): SitePlan({}, {"scale": torch.ones(site.shape[1], dtype=torch.float64)})
        for site in step.admitted(program)
    }
    fold_scales(step, program, rewriter)
    assert any("tied" in reason for reason in rewriter.refused.values())


def statistics(x: torch.Tensor) -> Moments:
    return Moments((2 * x.T @ x)[None], x.abs().mean(0)[None], x.abs().amax(0)[None], len(x))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.booleans(), st.sampled_from((0, 8, 16)))
def test_the_search_is_never_worse_than_no_factors(seed: int, symmetric: bool, mse: bool, group: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    weights, x = [normal(5, 32), normal(3, 32)], normal(40, 32) * normal(32).exp()
    scheme = Scheme("int4", group, symmetric, mse)
    alpha, scales, nearest, found = search(weights, statistics(x), [scheme] * len(weights))
    part = scheme.narrowed
    plain = [scheme.rounded(w, part(w)) for w in weights]
    scaled = [scheme.rounded(w * scales, part(w * scales)) / scales for w in weights]
    assert found <= nearest
    products = lambda others: sum(2 * (x @ (w - o).T).square().sum() for w, o in zip(weights, others, strict=True))
    assert products(plain).item() == pytest.approx(nearest) and products(scaled).item() == pytest.approx(found)
    assert (alpha == 0) == bool((scales == 1).all())


def test_channels_that_matter_are_kept_finer() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 64, dtype=torch.float64)
    x[:, :3] *= 30
    x[:, 5] = 0
    alpha, scales, nearest, found = search(
        [torch.randn(16, 64, dtype=torch.float64)], statistics(x), [Scheme("int4", 64)]
    )
    assert alpha > 0 and found < 0.6 * nearest
    assert scales[:3].min() > scales[6:].max() and scales[5] == 1
    assert torch.equal(factors(torch.zeros(4, dtype=torch.float64), 0.5), torch.ones(4, dtype=torch.float64))


def test_smoothing_evens_out_activations_and_weights() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(50, 8, dtype=torch.float64), [torch.randn(4, 8, dtype=torch.float64) for _ in range(2)]
    x[:, 2] *= 100
    x[:, 6] = 0
    scales = smooth(weights, x.abs().amax(0), 0.5)
    reach = torch.cat(weights).abs().amax(0) * scales
    live = [i for i in range(8) if i != 6]
    assert torch.allclose((x / scales).abs().amax(0)[live], reach[live])  # equation 4 at α = 1/2
    assert scales[6] == 1
    assert torch.allclose((x / smooth(weights, x.abs().amax(0), 1.0)).abs().amax(0)[live], torch.ones(7).double())


def outlying() -> Decoder:
    """One channel of each norm is 50 times the others, and what reads it makes up for that."""
    model = Decoder(Shape(width=16, heads=2, head=8, inner=32, layers=2)).float()
    with torch.no_grad():
        for norms, attention, mlp in zip(model.norms, model.attentions, model.mlps, strict=True):
            for norm, readers in ((norms[0], attention.qkv), (norms[1], (mlp.gate, mlp.up))):
                norm.weight[5] *= 50
                for reader in readers:
                    reader.weight[:, 5] /= 50
    return model


@torch.no_grad()
def off(model: nn.Module, pipeline: str, plan: Plan | None = None) -> float:
    after, _ = Pipeline(pipeline).run(fuseline.capture(model, (ids(),)), plan=plan, verification="full")
    reference = model(ids())
    return ((after.to_module()(ids()) - reference).norm() / reference.norm()).item()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method, rest", [("smooth", "weights=int8,activations=int8"), ("awq", "weights=int4:g16:sym")])
def test_in_a_program(method: str, rest: str, tmp_path) -> None:
    model = outlying()
    text = f"raise,quantize{{{rest},method={method}}}"
    plan = fuseline.analyze(model, text, [(ids(),), (ids(3).flip(0),)])
    assert off(model, text, plan) < 0.7 * off(model, f"raise,quantize{{{rest}}}")
    assert off(model, text, Plan.load(plan.save(tmp_path / "plan.json"))) == off(model, text, plan)
    found = Pipeline(text).passes[1].findings(plan.of("quantize"))
    assert any("without factors, " in line and "no scale passes" in line for line in found.lines)
    assert bool(found.rows)


def test_cost_is_the_error_of_the_products() -> None:
    torch.manual_seed(0)
    x, w, o = torch.randn(9, 4).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    assert cost([w], [o], 2 * x.T @ x) == pytest.approx((2 * (x @ (w - o).T).square().sum()).item())
