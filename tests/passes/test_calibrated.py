"""`quantize{method=gptq}` in programs: what each site is decided by, refusals, bad input, plans and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

import fuseline
from fuseline import Pipeline, UserError
from fuseline.compiler.errors import EmptyPassError
from fuseline.compiler.expressions import Decided
from fuseline.compiler.plan import Plan
from fuseline.compiler.schemes import Scheme
from fuseline.passes import Quantize
from fuseline.passes.calibrated import Method, columns
from fuseline.passes.calibrated.gptq import gptq
from fuseline.passes.calibrated.inputs import as_rows, groups_of
from fuseline.passes.quantize_sites import sites
from tests.helpers.models import Mlp, Tied, error
from tests.passes.rotated_models import VOCABULARY, Decoder, Shape

GPTQ = "quantize{weights=int4:g8:sym,method=gptq}"
SCHEME = Scheme("int4", 8)


def batches(*shape: int, count: int = 3) -> list[torch.Tensor]:
    """Correlated inputs in float64."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *sizes: torch.randn(*sizes, generator=draw, dtype=torch.float64)
    mixing = normal(shape[-1], shape[-1]) * normal(shape[-1]).exp()
    return [normal(*shape) @ mixing for _ in range(count)]


@torch.no_grad()
def after(model: nn.Module, pipeline: str, data: list[Any], plan: Plan | None = None) -> nn.Module:
    plan = plan or (fuseline.analyze(model, pipeline, data) if Pipeline(pipeline).needs_data else None)
    program = fuseline.capture(model, (data[0],))
    return Pipeline(pipeline).run(program, plan=plan, verification="full")[0].to_module()


def rounded(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return gptq(weight, 2 * x.T @ x, SCHEME).matrix


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 24).double(), nn.Linear(24, 8, bias=False).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@torch.no_grad()
@pytest.mark.parametrize("offload", [False, True])
def test_a_site_is_decided_by_what_rounded_sites_leave_it(offload: bool) -> None:
    model, data = Chain(), batches(2, 20, 16)
    pipeline = GPTQ.replace("}", ",offload}") if offload else GPTQ
    x = torch.cat(data).flatten(0, 1)
    first = rounded(model.first.weight, x)
    second = rounded(model.second.weight, torch.relu(F.linear(x, first, model.first.bias)))
    expected = F.linear(torch.relu(F.linear(data[0], first, model.first.bias)), second)
    assert error(after(model, pipeline, data)(data[0]), expected) < 1e-6
    alone = rounded(model.second.weight, torch.relu(model.first(x)))
    assert not torch.equal(alone, second)


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.only = nn.Linear(16, 8, bias=False).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(20, 16, dtype=torch.float64)
        h[:, :8].copy_(x[:, :8])
        h[:, 8:].add_(x[:, 8:])
        return self.only(h)


@torch.no_grad()
@pytest.mark.parametrize("offload", [False, True])
def test_each_batch_writes_to_memory_of_its_own(offload: bool) -> None:
    model, data = Writes(), batches(20, 16)
    pipeline = GPTQ.replace("}", ",offload}") if offload else GPTQ
    expected = F.linear(data[0], rounded(model.only.weight, torch.cat(data)))
    assert error(after(model, pipeline, data)(data[0]), expected) < 1e-6


@torch.no_grad()
def test_rounded_activations_are_what_a_site_reads() -> None:
    model, data = Chain(), batches(20, 16)
    model.second.weight.zero_()

    def per_token(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 7
        return (x / scale).round() * scale

    first = rounded(model.first.weight, per_token(torch.cat(data)))
    plan = fuseline.analyze(model, GPTQ.replace("}", ",activations=int4}"), data)
    decided = plan.sites["first/linear#0"]["quantize"]
    assert error(columns.expanded(decided, SCHEME, model.first.weight), first) < 1e-6
    assert error(rounded(model.first.weight, torch.cat(data)), first) > 1e-2


@torch.no_grad()
def test_behind_rotate_it_sees_rotated_inputs() -> None:
    model = Decoder(Shape(width=16, heads=2, head=8, inner=32, layers=1))
    draw = torch.Generator().manual_seed(0)
    data = [torch.randint(0, VOCABULARY, (4, 12), generator=draw) for _ in range(3)]
    plan = fuseline.analyze(model, f"raise,rotate{{r4}},{GPTQ}", data)
    site, decided = next((s, p["quantize"]) for s, p in plan.sites.items() if "down" in s)
    program, _ = Pipeline("raise,rotate{r4}").run(fuseline.capture(model, (data[0],)))
    down = next(s for s in sites(program) if s.path.endswith("down"))
    weight = down.weight.evaluate(lambda name: program.sources[name].tensor)
    assert decided.structure["error"] < 0.9 * decided.structure["error_nearest"]
    lost = (columns.expanded(decided, SCHEME, weight) - weight).norm() / weight.norm()
    plain = model.mlps[0].down.weight
    assert lost < 0.2 < (columns.expanded(decided, SCHEME, plain) - plain).norm() / plain.norm()


def test_rotations_are_learned_for_what_calibration_follows() -> None:
    both = Quantize(weights="int4:g8", activations="int4", method=Method.GPTQ, damp=0.1)
    assert str(both.without_data()) == "quantize{activations=int4,allow_empty}"
    assert Quantize(weights="int4", method=Method.AWQ).without_data().weights == "int4"
    model = Decoder(Shape(width=16, heads=2, head=8, inner=32, layers=1)).float()
    data = [torch.randint(0, VOCABULARY, (2, 12)) for _ in range(2)]
    text = "raise,rotate{r2,r4,kind=learned,steps=2},quantize{weights=int4:g8,activations=int4,method=gptq}"
    plan = fuseline.analyze(model, text, data)
    assert plan.of("rotate")[""].structure["measured"]["start"] > 0
    assert torch.isfinite(after(model, text, data, plan)(data[0])).all()


class Layouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.ParameterList(nn.Parameter(torch.randn(16, 8, dtype=torch.float64)) for _ in range(3))
        self.b = nn.Parameter(torch.randn(8, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.addmm(self.b, x, self.w[0]), torch.mm(x, self.w[1]), x @ self.w[2]


@torch.no_grad()
def test_products_with_transposed_weights_share_their_input() -> None:
    model, data = Layouts(), batches(20, 16)
    results = after(model, GPTQ, data)(data[0])
    for i, weight in enumerate(model.w):
        expected = F.linear(data[0], rounded(weight.T.contiguous(), torch.cat(data)), model.b if i == 0 else None)
        assert error(results[i], expected) < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.data())
def test_patches_times_the_matrix_are_the_convolution(
    rank: int, kernel: int, stride: int, padding: int, dilation: int, data: st.DataObject
) -> None:
    groups, same = data.draw(st.sampled_from((1, 2))), data.draw(st.booleans())
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    sizes = (kernel, *(data.draw(st.integers(1, 3)) for _ in range(rank - 1)))
    stride = 1 if same else stride
    model = kind(4, 6, sizes, stride, "same" if same else padding, dilation, groups, bias=False).double()
    x = torch.randn(*((2,) if data.draw(st.booleans()) else ()), 4, *(6 + i for i in range(rank)), dtype=torch.float64)
    with torch.no_grad():
        site = next(iter(sites(fuseline.capture(model, (x,)))))
        rows = as_rows(site, x)
        expected = model(x if x.dim() == rank + 2 else x[None])
    assert groups_of(site) == groups and rows.shape[0] == groups
    made = torch.cat([r @ w.T for r, w in zip(rows, model.weight.flatten(1).chunk(groups), strict=True)], 1)
    assert error(made, expected.movedim(1, -1).reshape(-1, 6)) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 2, groups=groups), nn.ReLU(), nn.Conv2d(8, 4, 2, padding="same")).double()
    data, text = batches(3, 4, 7, 7), "quantize{weights=int4:g4,method=gptq}"
    lost = [
        sum((run(x) - model(x)).square().sum() for x in data)
        for run in (after(model, text, data), after(model, text.replace("gptq", "rtn"), data))
    ]
    assert lost[0] < 0.9 * lost[1]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice = nn.Linear(16, 16).double(), nn.Linear(16, 16).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(torch.relu(self.twice(self.once(x))))


def test_a_weight_of_two_uses_is_refused() -> None:
    model, data = Twice(), batches(20, 16)
    plan = fuseline.analyze(model, GPTQ, data)
    _, report = Pipeline(GPTQ).run(fuseline.capture(model, (data[0],)), plan=plan)
    assert report["quantize"].matched == 1
    assert all("used 2 times" in reason for reason in report["quantize"].refused.values())
    assert any(
        "left as they were, 2 x" in line for line in Pipeline(GPTQ).passes[0].findings(plan.of("quantize")).lines
    )


def test_the_head_and_embeddings_where_they_are_named() -> None:
    model = Tied()
    data = [torch.randint(0, 12, (3, 5)) for _ in range(2)]
    plan = fuseline.analyze(model, GPTQ, data)
    assert list(plan.sites) == ["body/linear#0"]
    text = "quantize{weights=int4:g8:sym,method=gptq,only=*}"
    _, report = Pipeline(text).run(fuseline.capture(model, (data[0],)), plan=fuseline.analyze(model, text, data))
    assert report["quantize"].rules == {"linear": 2, "embedding": 1}


def test_batches_that_cannot_be_used() -> None:
    model, data = Chain(), batches(20, 16)
    with pytest.raises(UserError, match="holds no batch"):
        fuseline.analyze(model, GPTQ, [])
    broken = [data[0], data[1].clone()]
    broken[1][3, 2] = float("nan")
    with pytest.raises(UserError, match="batch 1 makes values that are no finite numbers at first/linear#0"):
        fuseline.analyze(model, GPTQ, broken)
    with pytest.raises(UserError, match="batch 1 is on meta, and the model on cpu"):
        fuseline.analyze(model, GPTQ, [data[0], data[1].to("meta")])
    with pytest.raises(UserError, match=r"batch 1 has sizes \[7, 16\], and the first \[20, 16\]"):
        fuseline.analyze(model, GPTQ, [data[0], data[1][:7]])
    with pytest.raises(UserError, match="fuseline.optimize.*calibration="):
        fuseline.optimize(model, GPTQ)


def test_findings_warn_of_few_samples_and_tell_of_dead_channels() -> None:
    model, (x, *_) = Chain(), batches(20, 16)
    with torch.no_grad():
        model.first.bias[3] = -1e6
    found = Pipeline(GPTQ).passes[0].findings(fuseline.analyze(model, GPTQ, [x]).of("quantize"))
    assert found.headings == ("sites", "count", "error", "after", "change")
    assert [row[:2] for row in found.rows] == [("first", "1"), ("second", "1")]
    assert found.lines[0].startswith("warning: fewer samples than channels at 1 of 2 sites, 20 for 24")
    assert any("input channels were zero in all batches" in line for line in found.lines)


def test_a_plan_is_kept_and_refuses_other_weights(tmp_path: Path) -> None:
    model, data = Chain(), batches(20, 16)
    plan = fuseline.analyze(model, GPTQ, data)
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    with torch.no_grad():
        expected = after(model, GPTQ, data, plan)(data[0])
        optimized = fuseline.optimize(Chain(), GPTQ, plan=loaded)
        assert torch.equal(optimized(data[0]), expected)
        fuseline.save(optimized, tmp_path / "saved")
        assert torch.equal(fuseline.load(tmp_path / "saved", model=Chain())(data[0]), expected)
        model.first.weight.mul_(1.01)
        with pytest.raises(UserError, match="chosen for other values of 'first.weight'"):
            after(model, GPTQ, data, plan)(data[0])


def test_codes_are_expressions_over_the_parameter() -> None:
    model, data = Mlp(), [x.float() for x in batches(30, 8)]
    plan = fuseline.analyze(model, GPTQ, data)
    program, _ = Pipeline(GPTQ).run(fuseline.capture(model, (data[0],)), plan=plan)
    decided = {e for n in program.weights() for e in n.meta["weight"].walk() if isinstance(e, Decided)}
    assert {e.parameters() for e in decided} == {("gate.weight",), ("up.weight",), ("down.weight",)}
    assert "gate_weight_codes" in {n.name for n in program.weights()}


def test_a_stopped_search_goes_on_where_it_was(monkeypatch, tmp_path: Path) -> None:
    model, data, file = Chain(), batches(20, 16), tmp_path / "progress.safetensors"
    whole = fuseline.analyze(model, GPTQ, data)
    decided, real = [], columns._decisions

    def stops(step, sites, *rest):
        if decided == ["first"]:
            decided.append("stopped")
            raise KeyboardInterrupt
        decided.append(sites[0].path)
        return real(step, sites, *rest)

    monkeypatch.setattr(columns, "_decisions", stops)
    with pytest.raises(KeyboardInterrupt):
        fuseline.analyze(model, GPTQ, data, checkpoint=file)
    assert file.exists()
    with pytest.raises(UserError, match="another search"):
        fuseline.analyze(model, GPTQ, data[:2], checkpoint=file)
    resumed = fuseline.analyze(model, GPTQ, data, checkpoint=file)
    assert decided == ["first", "stopped", "second"] and not file.exists()
    for site, passes in whole.sites.items():
        for name, tensor in passes["quantize"].tensors.items():
            assert torch.equal(resumed.sites[site]["quantize"].tensors[name], tensor)


@pytest.mark.parametrize(
    "options, reason",
    [
        ("weights=int4:g64,method=smooth", "none are"),
        ("activations=int8,method=gptq", "chooses the codes of weights"),
        ("weights=int4:g64,static", "'static' says nothing to method=rtn"),
        ("weights=int4:g64,method=awq,damp=0.1", "'damp' says nothing to method=awq"),
        ("weights=int4:g64,method=gptq,order", "'order' needs 'static'"),
        ("weights=int4:g64,method=gptq,damp=0", "damp is above 0"),
        ("weights=int4:g64,method=gtpq", "did you mean 'gptq'"),
    ],
)
def test_options_that_do_not_fit(options: str, reason: str) -> None:
    with pytest.raises(UserError) as raised:
        Pipeline(f"quantize{{{options}}}")
    assert reason in str(raised.value)


def test_nothing_decided_is_an_error_with_the_reason() -> None:
    model, data = Twice(), batches(20, 16)
    with pytest.raises(EmptyPassError, match="used 2 times"):
        fuseline.analyze(model, GPTQ.replace("}", ",only=twice}"), data)
    assert str(Quantize(weights="int8", method=Method.GPTQ)) == "quantize{weights=int8,method=gptq}"
