"""`method=fpq`: formats and ends of ranges by the error of products, and pre-shifted exponent biases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fuseline
from fuseline import Pipeline, UserError
from fuseline.compiler.errors import EmptyPassError
from fuseline.compiler.plan import Plan
from fuseline.compiler.schemes import Scheme
from fuseline.passes.calibrated.float_search import choices, choose_input, choose_weight, shifts, to_nearest
from tests.helpers.models import error, ops

FPQ = "quantize{weights=fp4,activations=fp4:static,method=fpq}"


class Linear(nn.Module):
    def __init__(self, inputs: int = 32, outputs: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(inputs, outputs).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def batches(spread: float = 2.0) -> list[torch.Tensor]:
    """Inputs whose channels differ in size."""
    draw = torch.Generator().manual_seed(0)
    sizes = (spread * torch.randn(32, generator=draw, dtype=torch.float64)).exp()
    return [torch.randn(64, 32, generator=draw, dtype=torch.float64) * sizes for _ in range(2)]


def test_every_format_of_as_many_bits_is_tried() -> None:
    names = lambda text, among=(): [s.format for s in choices(Scheme.parse(text, weights=True), among)]
    assert names("fp4") == ["e2m1", "e1m2", "e3m0"]
    assert set(names("fp8")) == {"e4m3", "e5m2", "e3m4", "e2m5", "e1m6"}
    assert names("fp8", ("e4m3", "e5m2")) == ["e4m3", "e5m2"]
    assert names("fp4", ("e4m3", "e3m0")) == ["e3m0"]
    assert names("mxfp4") == ["mxfp4"]
    assert Pipeline("quantize{weights=fp8,method=fpq,among=e4m3|e5m2}").passes[0].among == ("e4m3", "e5m2")


@pytest.mark.parametrize("text", ["fp4", "fp4:g8", "e3m2", "mxfp4", "fp4:b8"])
def test_no_worse_than_to_nearest_and_the_error_is_that_of_the_codes(text: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 32, generator=draw), torch.cat(batches()).float()
    scheme = Scheme.parse(text, weights=True)
    chosen, part, found = choose_weight(weight, x, x, scheme, ())
    back = chosen.rounded(weight, part)
    true = float((x.double() @ (weight - back).double().T).square().sum())
    assert found == pytest.approx(true, rel=1e-4)
    nearest = to_nearest(weight, x, x, scheme)
    assert true <= nearest * (1 + 1e-6)
    if text in ("fp4", "fp4:g8"):
        assert true < 0.9 * nearest


def test_weights_make_up_for_what_is_read_instead() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 32, generator=draw), torch.randn(200, 32, generator=draw)
    rounded = 0.9 * x  # the best weight is larger by a ninth
    chosen, part, found = choose_weight(weight, x, rounded, Scheme.parse("e3m4", weights=True), ("e3m4",))
    plain = float(
        (x.double() @ weight.T.double() - rounded.double() @ chosen.rounded(weight, 1.0).T.double()).square().sum()
    )
    assert found <= plain


def test_channels_are_shifted_by_powers_of_two() -> None:
    found = shifts(torch.tensor([8.0, 1.0, 0.001, 0.0]), most=3)
    assert found.tolist() == [1.0, 8.0, 8.0, 1.0]
    x = torch.cat(batches(3.0)).float()
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)) / x.abs().amax(0)  # every channel counts
    scheme = Scheme.parse("fp4:static", weights=False)
    made = choose_input(x, weight, scheme, ())
    groups, grid = scheme.grid(x.reshape(1, -1))
    plain = grid.element.rounded(groups, *grid.of(groups)).view_as(x)
    lost = lambda read: float(((x - read) @ weight.T).square().sum())
    assert lost(made.rounded) < 0.25 * lost(plain)
    assert (torch.log2(made.shift) % 1 == 0).all() and made.shift.max() > 1


@torch.no_grad()
def test_the_graph_computes_what_the_plan_says(tmp_path: Path) -> None:
    model, data = Linear(), batches()
    plan = fuseline.analyze(model, FPQ, data)
    decided = plan.sites["fc/linear#0"]["quantize"]
    after, _ = Pipeline(FPQ).run(fuseline.capture(model, (data[0],)), plan=plan, verification="full")
    assert ops(after) == ["mul", "encode_at", "decode", "decode", "linear"]
    weights, read = (Scheme.parse(decided.structure[k], weights=k == "scheme") for k in ("scheme", "activations"))
    shift, scale = decided.tensors["input_shift"].double(), float(decided.tensors["input_scale"])
    numbers = read.element.nearest(data[0] * shift / scale)
    x = numbers * scale
    codes = weights.element.numbers(decided.tensors["codes"], torch.float64)
    table = codes * decided.tensors["scale"].double()
    expected = F.linear(x, table, model.fc.bias)
    assert error(after.to_module()(data[0]), expected) < 1e-6
    assert decided.structure["error"] < 0.7 * decided.structure["error_nearest"]
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    optimized = fuseline.optimize(Linear(), FPQ, plan=loaded)
    assert error(optimized(data[0]), expected) < 1e-6
    fuseline.save(optimized, tmp_path / "saved")
    assert error(fuseline.load(tmp_path / "saved", model=Linear())(data[0]), expected) < 1e-6
    found = Pipeline(FPQ).passes[0].findings(plan.of("quantize"))
    assert any(line.startswith("activations: 1 x e") for line in found.lines)
    model.fc.weight.mul_(1.01)
    with pytest.raises(UserError, match="chosen for other values of 'fc.weight'"):
        Pipeline(FPQ).run(fuseline.capture(model, (data[0],)), plan=plan)[0].to_module()(data[0])


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@torch.no_grad()
@pytest.mark.parametrize("activations", ["", "activations=fp8:token,", "activations=fp4:static,"])
def test_it_beats_rounding_to_nearest_on_a_chain(activations: str) -> None:
    model, data = Chain(), [x.float() for x in batches()]

    def lost(pipeline: str) -> float:
        plan = fuseline.analyze(model, pipeline, data) if Pipeline(pipeline).needs_data else None
        run = Pipeline(pipeline).run(fuseline.capture(model, (data[0],)), plan=plan)[0].to_module()
        return sum(float((run(x) - model(x)).square().sum()) for x in data)

    text = f"quantize{{weights=fp4:g8,{activations}method=rtn}}"
    assert lost(text.replace("rtn", "fpq")) < 0.8 * lost(text)


def test_a_stopped_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuseline.passes.calibrated import floats

    model, data, file = Chain(), [x.float() for x in batches()], tmp_path / "progress.safetensors"
    whole = fuseline.analyze(model, FPQ, data)
    real, seen = floats._decisions, []

    def stops(step, stop, *rest):
        if seen == ["first"]:
            seen.append("stopped")
            raise KeyboardInterrupt
        seen.append(stop.sites[0].path)
        return real(step, stop, *rest)

    monkeypatch.setattr(floats, "_decisions", stops)
    with pytest.raises(KeyboardInterrupt):
        fuseline.analyze(model, FPQ, data, checkpoint=file)
    resumed = fuseline.analyze(model, FPQ, data, checkpoint=file)
    assert seen == ["first", "stopped", "second"] and not file.exists()
    for site, passes in whole.sites.items():
        for name, tensor in passes["quantize"].tensors.items():
            assert torch.equal(resumed.sites[site]["quantize"].tensors[name], tensor)


def test_what_it_cannot_search() -> None:
    with pytest.raises(UserError, match="chooses among floating-point formats"):
        Pipeline("quantize{weights=int4,method=fpq}")
    with pytest.raises(UserError, match="chooses the codes of weights"):
        Pipeline("quantize{activations=fp4:static,method=fpq}")
    model = nn.Sequential(nn.Conv1d(4, 8, 1))
    data = [torch.randn(2, 4, 8)]
    text = "quantize{weights=fp4,method=fpq}"
    with pytest.raises(EmptyPassError, match="matched no site") as caught:
        fuseline.analyze(model, text, data)
    assert any("not convolutions" in line for line in caught.value.details)
