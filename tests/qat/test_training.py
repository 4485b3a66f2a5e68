"""prepare_qat and convert: what is trained is what comes out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import fuseline
from fuseline import UserError
from fuseline.compiler import ops
from fuseline.compiler.errors import CaptureError
from fuseline.models.decoder import TinyDecoder
from tests.helpers.models import Mlp

PIPELINES = (
    "raise,quantize{weights=midrise2,method=paretoq}",
    "raise,quantize{weights=binary,activations=int4:asym,keys=int4:asym,values=int4:asym,method=paretoq}",
    "raise,quantize{weights=midrise2,method=paretoq,activations=int3:thresholds}",
    "raise,quantize{weights=int4:sym,activations=int8,keys=int8,values=int8}",
    "raise,quantize{weights=ternary:g8,method=paretoq},fuse",
    "raise,quantize{weights=int3:sym,method=paretoq,activations=int8},fuse",
    "raise,quantize{weights=int4:g8,only=*.gate|*.up},quantize{weights=midrise3,skip=*.gate|*.up|head,method=paretoq}",
    "raise,quantize{weights=int8,only=embed|head,method=rtn},quantize{weights=int4:sym,skip=head,method=paretoq}",
    "raise,quantize{weights=fp4:g16,activations=fp8}",
    "raise,rotate{r1,r2},quantize{weights=int4:sym:g16,method=paretoq}",
)


def decoder() -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(48, 32, 1, 4, 2)


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 48, shape, generator=torch.Generator().manual_seed(seed))


def train(qat: torch.nn.Module, steps: int = 3, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """To say the same id again."""
    optimizer = optimizer or torch.optim.AdamW(qat.parameters(), 3e-3, weight_decay=0.0)
    losses, batch = [], ids(3, 9)
    for _ in range(steps):
        loss = F.cross_entropy(qat(batch).flatten(0, 1), batch.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "pipeline", [p if "keys=int4" in p else pytest.param(p, marks=pytest.mark.slow) for p in PIPELINES]
)
def test_what_comes_out_is_what_was_trained(pipeline: str) -> None:
    model = decoder()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    qat = fuseline.prepare_qat(model, pipeline, ids(2, 12))
    train(qat)
    assert all(parameter.grad is not None for parameter in qat.parameters())
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    qat.eval()
    with torch.no_grad():
        batch = ids(4, 7)
        trained, plain = qat(batch), TinyDecoder.forward(model, batch)
        converted = fuseline.convert(qat, target="eager")
        assert converted is model
        found = converted(batch)
    assert (found - trained).abs().max() <= 1e-6 * trained.abs().max()
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()  # it is quantized


def test_codes_and_scales_are_those_of_training() -> None:
    model = decoder()
    qat = fuseline.prepare_qat(model, "raise,quantize{weights=midrise2,method=paretoq}", ids(2, 12))
    train(qat)
    alpha = qat.ranges["layers_0_gate_weight"].detach()
    weight = model.layers[0].gate.weight.detach()
    converted = fuseline.convert(qat, target="eager")
    with torch.no_grad():
        converted(ids(1, 5))
    (program,) = [c.program for c in fuseline.reports(converted)]
    node = next(n for n in program.weights() if "gate" in n.name and "scale" in n.name)
    (scale,) = program.binder([node.meta["weight"]])(program.examples)
    assert torch.equal(scale, alpha / 2)
    codes = next(n for n in program.weights() if "gate" in n.name and "codes" in n.name)
    (packed,) = program.binder([codes.meta["weight"]])(program.examples)
    wanted = ((weight / (alpha / 2) - 0.5).round() + 0.5).clamp(-1.5, 1.5) * alpha / 2
    assert torch.equal(ops.decode(packed, scale, None, None, "midrise2", 32, True, torch.float32), wanted)


def test_ranges_are_trained_and_saved() -> None:
    pipeline = "raise,quantize{weights=int4:sym,method=paretoq}"
    qat = fuseline.prepare_qat(decoder(), pipeline, ids(2, 12))
    start = {name: range.detach().clone() for name, range in qat.ranges.items()}
    assert len(start) == 7 and start["layers_0_q_weight"].shape == (32, 1)
    losses = train(qat, 20)
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(start[name], range) for name, range in qat.ranges.items())
    other = fuseline.prepare_qat(decoder(), pipeline, ids(2, 12))
    other.load_state_dict(qat.state_dict())
    twin = copy.deepcopy(qat)
    batch = ids(2, 5)
    assert torch.equal(other(batch), qat(batch)) and torch.equal(twin(batch), qat(batch))
    train(twin)
    assert not torch.equal(twin(batch), qat(batch)) and torch.equal(other(batch), qat(batch))


def test_a_converted_model_is_saved_and_loaded(tmp_path) -> None:
    qat = fuseline.prepare_qat(decoder(), "raise,quantize{weights=ternary,method=paretoq}", ids(2, 12))
    train(qat)
    converted = fuseline.convert(qat, target="eager", keep_originals=False)
    batch = ids(2, 6)
    with torch.no_grad():
        expected = converted(batch)
        fuseline.save(converted, tmp_path / "out")
        found = fuseline.load(tmp_path / "out", decoder())(batch)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.slow
def test_weights_that_changed_since_are_refused() -> None:
    qat = fuseline.prepare_qat(decoder(), "raise,quantize{weights=midrise2,method=paretoq}", ids(2, 12))
    converted = fuseline.convert(qat, target="eager")
    with torch.no_grad():
        converted(ids(1, 4))
        converted.layers[0].gate.weight.mul_(2)
        with pytest.raises(UserError, match="the plan's codes were chosen for other values"):
            converted(ids(1, 4))


class Shared(torch.nn.Module):
    """One linear at two places, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = torch.nn.Linear(16, 16), torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, *, twice: bool = True) -> torch.Tensor:
        x = torch.relu(self.body(self.drop(x)))
        return self.body(x) if twice else x


def test_one_weight_has_one_range_wherever_it_is_used() -> None:
    torch.manual_seed(0)
    qat = fuseline.prepare_qat(Shared(), "quantize{weights=binary,method=paretoq}", (torch.randn(4, 16),))
    (rounded,) = qat.rounded
    assert len(rounded.at) == 2 and list(qat.ranges) == ["body_weight"]
    qat.eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        expected = qat(x)
        assert torch.allclose(fuseline.convert(qat, target="eager")(x), expected, rtol=1e-6)


def test_dropout_is_the_models_in_training_alone() -> None:
    qat = fuseline.prepare_qat(Shared(), "quantize{weights=binary}", (torch.randn(4, 16),))
    x = torch.randn(3, 16)
    assert not torch.equal(qat(x), qat(x))
    qat.eval()
    assert torch.equal(qat(x), qat(x))
    without = fuseline.prepare_qat(Shared(), "quantize{weights=binary}", (torch.randn(4, 16),), dropout=False)
    assert torch.equal(without(x), without(x))


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(x)))


@pytest.mark.parametrize("pipeline", ("quantize{weights=int3:sym,method=paretoq}", "quantize{weights=midrise2}"))
def test_convolutions(pipeline: str) -> None:
    torch.manual_seed(0)
    model, x = Convolutions(), torch.randn(2, 3, 6, 6)
    qat = fuseline.prepare_qat(model, pipeline, (x,))
    qat(x).square().sum().backward()
    assert model.first.weight.grad.abs().sum() > 0
    qat.eval()
    with torch.no_grad():
        expected = qat(x)
        assert torch.allclose(fuseline.convert(qat, target="eager")(x), expected, rtol=1e-5, atol=1e-6)


def test_rounding_under_autograd_without_it_is_refused() -> None:
    for options in ("weights=midrise2,activations=int8", "keys=int8"):
        model = fuseline.optimize(decoder(), f"raise,quantize{{{options}}}", target="eager")
        with pytest.raises(Exception, match="rounding has none: train") as caught:
            model(ids(1, 4))
        assert "fuseline.prepare_qat" in str(caught.value)
        with torch.no_grad():
            model(ids(1, 4))


def test_frozen_weights_pass_gradients_but_activations_do_not() -> None:
    model = Mlp()
    for linear in (model.gate, model.up, model.down):
        linear.weight.requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    fuseline.optimize(model, "quantize{weights=int8}", target="eager")(x).sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(Exception, match="gradients pass through it, and rounding has none"):
        fuseline.optimize(model, "quantize{weights=int8,activations=int8}", target="eager")(x)


def test_a_trained_method_without_training_says_what_to_call() -> None:
    pipeline = "raise,quantize{weights=midrise2,method=paretoq}"
    with pytest.raises(UserError, match="takes what training found") as caught:
        fuseline.optimize(decoder(), pipeline)
    assert "qat = fuseline.prepare_qat(model" in str(caught.value)
    with pytest.raises(UserError, match="takes what training found"):
        fuseline.analyze(decoder(), pipeline, [ids(1, 4)])


@pytest.mark.parametrize(
    "pipeline,message",
    (
        ("raise,fuse", "rounds nothing that training could get used to"),
        ("quantize{weights=int4,method=gptq}", "decides from data once"),
        ("quantize{weights=int4,method=hqq}", "chooses codes once, and training changes the weights"),
    ),
)
def test_pipelines_that_cannot_be_trained(pipeline: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fuseline.prepare_qat(decoder(), pipeline, ids(1, 4))


@pytest.mark.parametrize(
    "options,message,remedy",
    (
        ("weights=int4", "has a zero point", "weights=int4:sym"),
        ("weights=fp4", "is not one of int2", "weights=midrise2"),
        ("weights=int4:sym:b8", "has one scale for several rows", "weights=int4:sym"),
        ("weights=ternary:mse", "has ranges searched for", "weights=midrise2"),
        ("activations=int8", "trains ranges of weights, and none are rounded", "weights=midrise2"),
    ),
)
def test_schemes_without_a_range_to_learn(options: str, message: str, remedy: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fuseline.Pipeline(f"quantize{{{options},method=paretoq}}")
    assert remedy in str(caught.value)


def test_one_weight_in_two_ways_is_refused() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    pipeline = "quantize{weights=int4:sym,method=paretoq,only=a},quantize{weights=binary,only=b}"
    with pytest.raises(UserError):
        fuseline.prepare_qat(Tied(), pipeline, (torch.randn(2, 8),))


class Skips(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training and torch.rand(()) < 0.5 else self.body(x)


def test_a_model_that_is_one_graph_in_evaluation_alone() -> None:
    with pytest.raises(CaptureError, match="cannot be captured as one graph") as caught:
        fuseline.prepare_qat(Skips(), "quantize{weights=int8}", (torch.randn(2, 8),))
    assert "dropout=False" in str(caught.value)
    fuseline.prepare_qat(Skips(), "quantize{weights=int8}", (torch.randn(2, 8),), dropout=False)


@pytest.mark.slow
def test_bfloat16() -> None:
    model, batch = decoder().bfloat16(), ids(2, 6)
    qat = fuseline.prepare_qat(model, "raise,quantize{weights=midrise2,activations=int8,method=paretoq}", batch)
    train(qat)
    qat.eval()
    with torch.no_grad():
        expected = qat(batch)
        assert torch.equal(fuseline.convert(qat, target="eager")(batch), expected)
    assert qat.ranges["layers_0_q_weight"].dtype == torch.float32


def test_a_converted_type_has_graphs_of_its_own() -> None:
    qat = fuseline.prepare_qat(decoder(), "raise,quantize{weights=midrise2,activations=int2:thresholds}", ids(2, 6))
    before, steps = qat(ids(2, 6)), {name: range.detach().clone() for name, range in qat.ranges.items()}
    after = qat.double()(ids(2, 6))
    assert after.dtype == torch.float64 and steps.keys() == qat.ranges.keys()
    assert all(torch.equal(steps[name].double(), range) for name, range in qat.ranges.items())
    assert (after - before).abs().mean() < 0.05 * before.abs().max()  # a few values may cross a threshold


def test_convert_takes_what_prepare_made() -> None:
    with pytest.raises(UserError, match="convert takes what prepare_qat made, not TinyDecoder"):
        fuseline.convert(decoder())
