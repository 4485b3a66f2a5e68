"""quantize on convolutions: one scale an output channel, against a reference computed here; refusals with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fuseline
from fuseline import Pipeline
from fuseline.compiler.errors import EmptyPassError
from fuseline.compiler.expressions import Pack, Reshape
from tests.helpers.models import error, ops

KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(3, 6, 3), (2, 3, 9, 8)),
    "strided, without a bias": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, bias=False), (2, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (1, 8, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 5, groups=6), (2, 6, 7, 7)),
    "dilated, padding in words": (lambda: nn.Conv2d(3, 5, 3, dilation=2, padding="same"), (2, 3, 8, 8)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 11)),
    "one dimension, padding in words": (lambda: nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 11)),
    "three dimensions": (lambda: nn.Conv3d(2, 4, 2), (1, 2, 4, 5, 3)),
    "without a batch": (lambda: nn.Conv2d(3, 6, 3), (3, 9, 8)),
}


def reference(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The convolution in float64 with each output channel's kernel rounded to 127 steps: no code of ours."""
    rounded = torch.empty_like(conv.weight, dtype=torch.float64)
    for channel, kernel in enumerate(conv.weight.detach().double()):
        scale = (kernel.abs().max() / 127).float().double()
        rounded[channel] = (kernel / scale).round() * scale
    copy = type(conv)(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        copy.weight.copy_(rounded)
        if conv.bias is not None:
            copy.bias.copy_(conv.bias)
    return copy(x.double()).detach()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_rounding_each_output_channel(kind: str) -> None:
    torch.manual_seed(0)
    build, shape = KINDS[kind]
    conv, x = build(), torch.randn(shape)
    program = fuseline.capture(conv, (x,))
    after, report = Pipeline("quantize{weights=int8}").run(program, verification="full")
    assert report["quantize"].matched == 1
    assert ops(after)[:2] == ["dequantize", "view"] and ops(after)[2] == ops(program)[-1]
    (packed,) = (e for e in after.lift()[1] if isinstance(e, Pack))
    assert any(isinstance(e, Reshape) for e in packed.walk())
    codes = next(n.meta["val"] for n in after.weights() if n.meta["weight"] == packed)
    assert codes.dtype == torch.int8 and tuple(codes.shape) == (conv.out_channels, conv.weight[0].numel())
    assert error(after.to_module()(x).double(), reference(conv, x)) < 1e-5


@torch.no_grad()
def test_groups_of_input_positions() -> None:
    conv, x = nn.Conv2d(8, 6, 3), torch.randn(1, 8, 6, 6)
    after, _ = Pipeline("quantize{weights=int4:g24}").run(fuseline.capture(conv, (x,)), verification="full")
    matrix = conv.weight.flatten(1).unflatten(1, (-1, 24)).double()
    low, high = matrix.amin(-1, keepdim=True).clamp(max=0), matrix.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).float().double()
    zero = (-low / scale).round()
    rounded = (((matrix / scale + zero).round().clamp(0, 15) - zero) * scale).view_as(conv.weight)
    expected = torch.nn.functional.conv2d(x.double(), rounded, conv.bias.double())
    assert error(after.to_module()(x).double(), expected) < 1e-5


class Image(nn.Module):
    """Two convolutions, a linear, and the products that are not taken."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.experts = nn.Parameter(torch.randn(2, 4, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.second(torch.relu(self.first(x)))).mean((-1, -2))
        return self.head(torch.bmm(x.expand(2, -1, -1), self.experts))


def test_what_is_no_site_is_refused_with_its_reason() -> None:
    program = fuseline.capture(Image().eval(), (torch.randn(1, 3, 6, 6),))
    _, report = Pipeline("quantize{weights=int8}").run(program)
    assert report["quantize"].rules == {"convolution": 2, "linear": 1}
    reasons = sorted(report["quantize"].refused.values())
    assert reasons[0] == ("a weight [2, 4, 5] of bmm: matrices and convolutions are quantized, not stacks of matrices")
    assert reasons[1] == (
        "a weight [8, 4, 2, 2] of conv_transpose2d: a transposed convolution's output channels are not its first "
        "dimension"
    )


def test_activations_of_a_convolution_are_refused() -> None:
    program = fuseline.capture(Image().eval(), (torch.randn(1, 3, 6, 6),))
    after, report = Pipeline("quantize{weights=int8,activations=int8}").run(program)
    assert report["quantize"].matched == 1 and ops(after).count("quantize") == 1
    reason = "a convolution's input has no tokens to share a scale: leave the convolutions out, skip=…"
    assert list(report["quantize"].refused.values()).count(reason) == 2
    with pytest.raises(EmptyPassError, match="no tokens to share a scale"):
        Pipeline("quantize{weights=int8,activations=int8,only=first}").run(program)


def test_only_and_skip_name_convolutions() -> None:
    program = fuseline.capture(Image().eval(), (torch.randn(1, 3, 6, 6),))
    for options, expected in (("only=first", 1), ("only=first|second", 2), ("only=*,skip=first|up", 2)):
        _, report = Pipeline(f"quantize{{weights=int8,{options}}}").run(program)
        assert report["quantize"].matched == expected
        # what the options leave out is not worth a word
        assert ["conv_transpose2d" in reason for reason in report["quantize"].refused.values()].count(True) == 0


@torch.no_grad()
def test_the_memory_format_of_the_weights_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9)
    strides = model(x).stride()
    after, _ = Pipeline("quantize{weights=int8}").run(fuseline.capture(model, (x,)), verification="full")
    assert after.to_module()(x).stride() == strides
    assert error(after.to_module()(x), model(x)) < 0.05


@torch.no_grad()
def test_through_optimize_the_weight_may_change() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 6, 3), torch.randn(2, 3, 9, 8)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    model = fuseline.optimize(Net(), "quantize{weights=int8}")
    assert error(model(x).double(), reference(conv, x)) < 1e-5
    conv.weight.mul_(-3)
    assert error(model(x).double(), reference(conv, x)) < 1e-5


def test_a_table_as_long_as_it_is_wide_makes_no_head() -> None:
    """In a part of a model the last linear back to the width is as long as a table of positions can be."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.down = nn.Embedding(8, 8), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(x) + self.places(torch.arange(4))

    _, report = Pipeline("quantize{weights=int8}").run(fuseline.capture(Part(), (torch.randn(4, 16),)))
    assert report["quantize"].matched == 1 and not report["quantize"].refused
