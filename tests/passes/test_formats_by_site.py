"""Weights of several formats: overrides by module path, and `bits=auto` under a budget of bytes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

import fuseline
from fuseline import Pipeline, UserError
from fuseline.compiler.plan import Plan
from fuseline.compiler.schemes import Scheme
from fuseline.passes.calibrated.allot import allot
from fuseline.passes.calibrated.budget import Budget
from fuseline.passes.calibrated.sensitivity import sensitivities
from fuseline.passes.quantize_sites import sites
from tests.helpers.models import Mlp, error

AUTO = "quantize{weights=int4:g8:sym,bits=auto:5bits}"


def rounded(text: str, weight: torch.Tensor) -> torch.Tensor:
    return Scheme.parse(text, weights=True).rounded(weight.detach(), 1.0)


@pytest.mark.one_in(2)
@torch.no_grad()
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_overrides_are_rounded_as_they_say(method: str) -> None:
    torch.manual_seed(0)
    model, x = Mlp().double(), torch.randn(3, 8, dtype=torch.float64)
    text = f"quantize{{weights=int4:g8:sym,overrides=down:int8|*:int3:g4:sym,method={method},skip=up}}"
    program, report = Pipeline(text).run(fuseline.capture(model, (x,)), verification="full")
    assert report["quantize"].matched == 2
    ops = torch.ops.fuseline
    held = [n.args[4] for n in program.graph.nodes if n.target is ops.decode.default]
    held += [f"int{n.args[3]}" for n in program.graph.nodes if n.target is ops.dequantize.default]
    assert sorted(held) == ["int3", "int8"]
    made = program.to_module()(x)  # before the weights are replaced: codes follow them
    if method == "rtn":
        model.down.weight.copy_(rounded("int8", model.down.weight))
        model.gate.weight.copy_(rounded("int3:g4:sym", model.gate.weight))
        assert error(made, model(x)) < 1e-6


def test_two_passes_mix_activations_too() -> None:
    model, x = Mlp(), torch.randn(3, 8)
    text = "quantize{weights=int8,activations=int8,only=down},quantize{weights=int4:g8}"
    program, report = Pipeline(text).run(fuseline.capture(model, (x,)))
    assert [p.matched for p in report.passes] == [1, 2]
    assert sum(n.target is torch.ops.fuseline.quantize.default for n in program.graph.nodes) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("weights=int4,overrides=down", "'down' is no override"),
        ("weights=int4,overrides=down:int9", "unknown number format 'int9'"),
        ("activations=int8,overrides=down:int8", "'overrides' is about weights"),
        ("activations=int8,bits=auto:4bits", "'bits' is about weights"),
        ("weights=int4,bits=4", "is no budget"),
        ("weights=int4,bits=auto:0MB", "is no budget"),
        ("weights=int4,among=int8|int4", "'among' says what"),
        ("weights=mxfp4,bits=auto:4bits", "no other widths"),
    ],
)
def test_mistaken_options(options: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Pipeline(f"quantize{{{options}}}")


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("auto:2KB", 2000),
        ("auto:1.5MiB", 1.5 * 2**20),
        ("auto:100", 100),
        ("auto:0.25x", 1000),
        ("auto:4bits", 500),
        ("auto:1bit", 125),
    ],
)
def test_budgets(text: str, bytes: float) -> None:
    assert Budget.parse(text).bytes(weights=1000, stored=4000) == bytes


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_the_choice_is_the_best_that_fits(count: int, formats: int, seed: int, where: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    costs, sizes = (torch.rand(2, count, formats, generator=draw).double() + 0.01).tolist()
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    budget = least + where * (most - least) + 1e-6
    chosen = allot(costs, sizes, budget)
    total = lambda values, picked: sum(row[j] for row, j in zip(values, picked, strict=True))
    assert total(sizes, chosen) <= budget * (1 + 1e-6)
    best = min(
        total(costs, picked)
        for picked in itertools.product(range(formats), repeat=count)
        if total(sizes, picked) <= budget
    )
    assert total(costs, chosen) <= best * 1.002 + 1e-6


class Predicts(nn.Module):
    """Logits, of which only the first product decides much."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.matters, self.little = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(self.matters(x) + 0.01 * self.little(x))


def ids(count: int = 3) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (8, 64), generator=draw) for _ in range(count)]


def test_costs_are_the_divergence_that_rounding_makes() -> None:
    model, data = Predicts(), ids(8)
    with torch.no_grad():
        program = fuseline.capture(model, (data[0],))
        found = [site for site in sites(program) if site.path in ("matters", "little")]
        module = program.to_module()
        schemes = [Scheme.parse(text, weights=True) for text in ("int6:g8:sym", "int4:g8:sym", "int3:g8:sym")]
        costs = sensitivities(program, found, [schemes] * 2, [module.arguments(x) for x in data])
        for site, row in zip(found, costs, strict=True):
            for scheme, cost in zip(schemes, row, strict=True):
                changed = Predicts()
                weight = changed.get_submodule(site.path).weight
                weight.copy_(scheme.rounded(weight, 1.0))
                p, q = (
                    F.log_softmax(torch.cat([m(x) for x in data]).double().flatten(0, 1), -1) for m in (model, changed)
                )
                true = float(F.kl_div(q, p, log_target=True, reduction="batchmean"))
                assert cost == pytest.approx(true, rel=0.25), (site.path, str(scheme))


def test_bits_go_where_they_matter(tmp_path: Path) -> None:
    model, data = Predicts(), ids()
    plan = fuseline.analyze(model, AUTO.replace("5bits", "8.5bits"), data)
    schemes = {site: passes["quantize"].structure["scheme"] for site, passes in plan.sites.items()}
    chosen = {site.partition("/")[0]: int(text[3]) for site, text in schemes.items()}
    assert chosen["matters"] > chosen["little"]
    held = sum(p["quantize"].structure["bytes"] for p in plan.sites.values())
    assert held <= 8.5 / 8 * 2 * 16 * 16
    found = Pipeline(AUTO).passes[0].findings(plan.of("quantize"))
    assert found.headings == ("sites", "count", "bits a weight", "formats") and len(found.rows) == 2
    assert "bits a weight; expected to cost" in found.lines[0]
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    text = plan.pipeline
    with torch.no_grad():
        optimized = fuseline.optimize(Predicts(), text, plan=loaded)
        by_hand = Predicts()
        for name in chosen:
            weight = by_hand.get_submodule(name).weight
            weight.copy_(rounded(next(t for s, t in schemes.items() if s.startswith(name)), weight))
        assert error(optimized(data[0]), by_hand(data[0])) < 1e-5


def test_chosen_formats_are_what_gptq_rounds_to() -> None:
    model, data = Predicts(), ids()
    text = "quantize{weights=int4:g8:sym,bits=auto:8.5bits,method=gptq}"
    plan = fuseline.analyze(model, text, data)
    schemes = {p["quantize"].structure["scheme"] for p in plan.sites.values()}
    assert len(schemes) == 2
    for passes in plan.sites.values():
        decided = passes["quantize"]
        most = 2 ** int(decided.structure["scheme"][3]) - 1
        assert decided.structure["error"] <= decided.structure["error_nearest"]
        assert 0 < int(decided.tensors["codes"].max()) <= most
    lines = Pipeline(text).passes[0].findings(plan.of("quantize")).lines
    assert any("bits a weight" in line for line in lines)
    program, report = Pipeline(text).run(fuseline.capture(model, (data[0],)), plan=plan, verification="full")
    assert report["quantize"].matched == 2


def test_a_budget_that_is_too_small_says_what_would_do() -> None:
    with pytest.raises(UserError, match="2 sites take .* at the least") as caught:
        fuseline.analyze(Predicts(), AUTO.replace("5bits", "2bits"), ids())
    assert "bits=auto:6." in caught.value.remedy


def test_a_model_without_logits_is_judged_by_its_results() -> None:
    model, data = Mlp(), [torch.randn(16, 8) for _ in range(2)]
    plan = fuseline.analyze(model, AUTO.replace("5bits", "9.5bits"), data)
    assert len(plan.sites) == 3
    assert all(p["quantize"].structure["cost"] > 0 for p in plan.sites.values())


def test_an_embedding_wants_a_format_of_its_own() -> None:
    model, data = Predicts(), ids()
    text = "quantize{weights=int4:g8:sym,bits=auto:9bits,only=*}"
    program = fuseline.capture(model, (data[0],))
    _, report = Pipeline(text).run(program, plan=fuseline.analyze(model, text, data))
    assert report["quantize"].rules == {"linear": 3}
    (reason,) = report["quantize"].refused.values()
    assert "overrides=embed:FORMAT" in reason
    text = text.replace("only=*", "only=*,overrides=embed:int8")
    _, report = Pipeline(text).run(program, plan=fuseline.analyze(model, text, data))
    assert report["quantize"].rules == {"linear": 3, "embedding": 1} and not report["quantize"].refused
