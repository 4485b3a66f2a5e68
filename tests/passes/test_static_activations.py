"""`activations=…:static`: ranges that observers find before the run, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import fuseline
from fuseline import Pipeline, UserError
from fuseline.compiler.plan import Plan
from fuseline.compiler.schemes import Scheme
from fuseline.passes.calibrated.observers import MOMENTUM, STEPS, Observer
from tests.helpers.models import Mlp, error, ops

STATIC = "quantize{activations=int8:static}"


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def batches(count: int = 3) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(5, 8, generator=draw, dtype=torch.float64) + 0.5 for _ in range(count)]


def nearest(x: torch.Tensor, low: float, high: float, bits: int, symmetric: bool) -> torch.Tensor:
    """Written out, in float64: what the codes stand for."""
    if symmetric:
        most = 2 ** (bits - 1) - 1
        scale = float(torch.tensor(high / most, dtype=torch.float32))
        return (x / scale).round().clamp(-most - 1, most) * scale
    scale = float(torch.tensor((high - low) / (2**bits - 1), dtype=torch.float32))
    zero = round(-low / scale)
    return ((x / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


@torch.no_grad()
@pytest.mark.parametrize("text", ["int8:static", "int8:tensor:static", "int8:static:asym", "int4:static:asym"])
def test_one_range_for_all_calls(text: str) -> None:
    model, data = Linear(), batches()
    pipeline = f"quantize{{activations={text}}}"
    plan = fuseline.analyze(model, pipeline, data)
    after, _ = Pipeline(pipeline).run(fuseline.capture(model, (data[0],)), plan=plan, verification="full")
    assert ops(after) == ["encode_at", "decode", "linear"]
    scheme, whole = Scheme.parse(text, weights=False), torch.cat(data)
    low, high = min(float(whole.min()), 0.0), float(whole.max())
    largest = float(whole.abs().max())
    ends = (-largest, largest) if scheme.symmetric else (low, high)
    far = data[0] * 100  # beyond what was seen: saturates
    for x in (data[0], far):
        expected = model(nearest(x, *ends, scheme.bits, scheme.symmetric))
        assert error(after.to_module()(x), expected) < 1e-6


@torch.no_grad()
def test_one_value_has_one_range_and_is_rounded_once() -> None:
    model, data = Mlp(), [x.float() for x in batches()]
    plan = fuseline.analyze(model, "quantize{weights=int8,activations=fp8:static}", data)
    after, _ = Pipeline(plan.pipeline).run(fuseline.capture(model, (data[0],)), plan=plan)
    assert ops(after).count("encode_at") == 2  # gate and up read one value
    assert error(after.to_module()(data[0]), model(data[0])) < 0.1
    found = Pipeline(plan.pipeline).passes[0].findings(plan.of("quantize"))
    assert found.headings == ("sites", "count", "least", "largest") and len(found.rows) == 3


def test_observers() -> None:
    data = batches(4)
    ends = [(float(x.min()), float(x.max())) for x in data]
    assert Observer.parse("largest").range(iter(data), False) == (min(e[0] for e in ends), max(e[1] for e in ends))
    low, high = ends[0]
    for least, most in ends[1:]:
        low, high = low + MOMENTUM * (least - low), high + MOMENTUM * (most - high)
    assert Observer.parse("mean").range(iter(data), False) == pytest.approx((low, high))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from((90.0, 99.0, 99.9)), st.booleans(), st.sampled_from((1e-20, 1.0, 1e8))
)
def test_a_percentile_is_that_of_all_values(seed: int, share: float, symmetric: bool, size: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    data = [torch.randn(4000, generator=draw, dtype=torch.float64) * size * (i + 1) for i in range(3)]
    low, high = Observer.parse(f"p{share}").range(iter(data), symmetric)
    whole = torch.cat(data)
    step, allowed = 4 * float(whole.abs().max()) / STEPS, (1 - share / 100) * len(whole)
    outside = lambda slack: int(((whole < low - slack) | (whole > high + slack)).sum())
    assert outside(step) <= allowed + 1 and outside(-step) >= allowed - 2
    assert low == -high if symmetric else low < 0 < high


def test_a_range_of_zero_and_zeros_within() -> None:
    assert Observer.parse("p99.9").range(iter([torch.zeros(3)]), True) == (-0.0, 0.0)
    model = Linear()
    zeros = [torch.zeros(5, 8, dtype=torch.float64)]
    plan = fuseline.analyze(model, STATIC, zeros)
    after, _ = Pipeline(STATIC).run(fuseline.capture(model, (zeros[0],)), plan=plan)
    with torch.no_grad():
        assert torch.equal(after.to_module()(zeros[0]), model(zeros[0]))


def test_ranges_are_those_behind_the_factors_of_smooth() -> None:
    model, data = Mlp(), [x.float() for x in batches()]
    data[0][:, 3] *= 50
    text = "raise,quantize{weights=int8,activations=int8:static,method=smooth}"
    plan = fuseline.analyze(model, text, data)
    gate = plan.sites["gate/linear#0"]["quantize"]
    assert gate.structure["range"][1] == pytest.approx(gate.structure["largest"], rel=1e-3)
    assert gate.structure["range"][1] < 0.5 * gate.structure["largest_before"]


@torch.no_grad()
def test_gptq_sees_inputs_rounded_at_those_ranges() -> None:
    model, data = Linear(), batches()
    text = "quantize{weights=int4:sym,activations=int4:static,method=gptq}"
    plan = fuseline.analyze(model, text, data)
    x = torch.cat(data)
    largest = float(x.abs().max())
    rounded = nearest(x, -largest, largest, 4, True)
    decided = plan.sites["fc/linear#0"]["quantize"]
    from fuseline.passes.calibrated.gptq import gptq

    expected = gptq(model.fc.weight, 2 * rounded.T @ rounded, Scheme.parse("int4:sym", weights=True))
    assert torch.equal(decided.tensors["codes"], expected.parts["codes"])


def test_a_plan_is_needed_and_kept(tmp_path: Path) -> None:
    model, data = Linear(), batches()
    with pytest.raises(UserError, match="decides from data, and there is none"):
        fuseline.optimize(model, STATIC)
    plan = fuseline.analyze(model, STATIC, data)
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    with torch.no_grad():
        one, other = (fuseline.optimize(Linear(), STATIC, plan=p)(data[0]) for p in (plan, loaded))
    assert torch.equal(one, other)
    assert Pipeline(STATIC).passes[0].without_data().activations == "int8"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("activations=mxfp4:static", "a scale for each block of 32 channels, found at run time"),
        ("activations=int8:token:static", "is one for the tensor"),
        ("activations=int8:g32:static", "is one for the tensor"),
        ("weights=int8:static", "unknown part 'static'"),
        ("keys=int8:static", "would change the codes"),
        ("activations=int8,observe=p99.9", "there are none"),
        ("activations=int8:static,observe=median", "observe cannot be 'median'"),
        ("activations=int8:static,observe=p20", "observe cannot be 'p20'"),
    ],
)
def test_mistaken_options(options: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Pipeline(f"quantize{{{options}}}")
