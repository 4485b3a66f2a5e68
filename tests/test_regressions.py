"""Mistakes that users found, each kept out by the case that showed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fuseline


def both(function: Any, *inputs: Any, pipeline: str = "raise{allow_empty},fuse{allow_empty}") -> tuple[Any, Any]:
    """The result of eager and of the backend."""
    torch.compiler.reset()
    compiled = torch.compile(function, backend="fuseline", options={"pipeline": pipeline})
    return function(*inputs), compiled(*inputs)


def test_training_under_autocast_keeps_the_types_of_outputs() -> None:
    layer = nn.Linear(4, 4)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return y, y.float()

    for expected, actual in zip(*both(function, torch.randn(2, 4)), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@torch.no_grad()
def test_another_memory_format_is_no_identity() -> None:
    x = torch.randn(2, 3, 4, 4)
    expected, actual = both(lambda x: x.to(memory_format=torch.channels_last), x)
    assert actual.stride() == expected.stride() != x.stride()
    expected, actual = both(lambda x: x.to(memory_format=torch.channels_last).permute(0, 2, 3, 1).view(-1, 3) * 2, x)
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_a_detached_output_is_not_its_input() -> None:
    x = torch.randn(3, requires_grad=True)
    expected, actual = both(lambda x: (x.detach(), x * 2), x)
    assert not expected[0].requires_grad and not actual[0].requires_grad
    assert actual[0] is not x


@torch.no_grad()
def test_a_quantized_weight_used_in_two_types() -> None:
    layer = nn.Linear(4, 4)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return y, layer(x)

    expected, actual = both(function, torch.randn(2, 4), pipeline="quantize{weights=int8}")
    for e, a in zip(expected, actual, strict=True):
        assert a.dtype == e.dtype
        assert (a.float() - e.float()).abs().max() < 0.05


def test_a_rewritten_program_saved_and_read_again(tmp_path) -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
    x = torch.randn(3, 16)
    program, _ = fuseline.Pipeline("raise").run(fuseline.capture(model, (x,)))
    exported = torch.export.export(program.to_module(), (x,))
    torch.export.save(exported, tmp_path / "program.pt2")

    from fuseline.compiler.capture import from_exported

    again = from_exported(torch.export.load(tmp_path / "program.pt2"))
    with pytest.raises(fuseline.UserError, match="matched no site"):  # everything is raised already
        fuseline.Pipeline("raise").run(again)
    after, report = fuseline.Pipeline("raise{allow_empty},fuse").run(again)
    assert report["fuse"].matched == 1
    assert torch.equal(after.to_module()(x), model(x))
