"""Capture through `torch.export`, from a `.pt2` file and from any FX graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.export import Dim

import fuseline
from fuseline import Pipeline, Program
from fuseline.compiler.capture import from_exported
from fuseline.compiler.errors import CaptureError
from tests.helpers.models import Mlp, Tied, error, ops, tiny_llama


class Keywords(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor, twice: bool = False) -> dict[str, torch.Tensor]:
        y = self.inner(x) + shift
        return {"once": y, "more": y * 2 if twice else y}


@torch.no_grad()
def test_keyword_arguments_and_structured_results() -> None:
    model, x = Keywords(), torch.randn(2, 8)
    program = fuseline.capture(model, (x,), {"shift": torch.ones(8), "twice": True})
    run = program.to_module()
    y = torch.randn(2, 8)
    actual, expected = run(y, shift=x, twice=True), model(y, shift=x, twice=True)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[k], expected[k]) for k in actual)


def test_other_arguments_than_captured_are_refused() -> None:
    program = fuseline.capture(Keywords(), (torch.randn(2, 8),), {"shift": torch.ones(8), "twice": True})
    with pytest.raises(CaptureError, match="not laid out as at capture") as caught:
        program.to_module()(torch.randn(2, 8), shift=torch.ones(8))
    assert "captured:" in str(caught.value) and "called:" in str(caught.value)


@torch.no_grad()
def test_dynamic_sizes_stay_symbolic() -> None:
    model, ids = tiny_llama(), torch.randint(0, 100, (2, 7))
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "use_cache": None}
    run = fuseline.capture(model, (ids,), {"use_cache": False}, dynamic=shapes).to_module()
    for batch, length in ((2, 7), (3, 12), (1, 2)):
        ids = torch.randint(0, 100, (batch, length))
        assert error(run(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 1e-6


@torch.no_grad()
def test_a_pt2_file_gives_the_same_program(tmp_path: Path) -> None:
    model, x = Mlp(), torch.randn(2, 8)
    path = tmp_path / "mlp.pt2"
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: Dim.AUTO},)), path)
    program = from_exported(torch.export.load(path))
    assert set(program.sources) == {name for name, _ in model.named_parameters()}
    y = torch.randn(5, 8)
    assert torch.equal(program.to_module()(y), model(y))


@torch.no_grad()
def test_a_parameter_replaced_or_edited_is_seen() -> None:
    model, x = Mlp(), torch.randn(2, 8)
    run = fuseline.capture(model, (x,)).to_module()
    model.up.weight = torch.nn.Parameter(torch.randn(16, 8))
    assert torch.equal(run(x), model(x))
    model.down.bias.mul_(-2)
    assert torch.equal(run(x), model(x))
    quantized, _ = Pipeline("quantize{weights=int8}").run(fuseline.capture(model, (x,)))
    run = quantized.to_module()
    run(x)
    model.up.weight = torch.nn.Parameter(torch.randn(16, 8) * 5)
    assert error(run(x), model(x)) < 0.05


def test_tied_parameters_stay_tied() -> None:
    program = fuseline.capture(Tied(), (torch.tensor([1, 2]),))
    assert len(program.lift()[1]) == 3
    quantized, _ = Pipeline("quantize{weights=int8,only=*}").run(program)
    packed = [e for e in quantized.lift()[1] if type(e).__name__ == "Pack"]
    assert len(packed) == 2  # one for table and head together, one for the body


class Branch(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line
            return x + 1
        return x - 1


def test_a_model_that_cannot_be_captured_names_the_line_and_the_change() -> None:
    with pytest.raises(CaptureError) as caught:
        fuseline.capture(Branch(), (torch.randn(3),))
    text = str(caught.value)
    assert text.startswith("Branch cannot be captured as one graph")
    assert "test_capture_export.py" in text and "if x.sum() > 0:  # the line" in text
    assert "torch.where" in text
    assert caught.value.exit_code == 2


class Item(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(int(x[0].item())) + x.numpy().sum()


def test_leaving_pytorch_names_the_line_too() -> None:
    with pytest.raises(CaptureError, match="x.numpy"):
        fuseline.capture(Item(), (torch.ones(3),))


class Counter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x * self.calls


@torch.no_grad()
def test_a_buffer_that_forward_writes_is_declared_and_written() -> None:
    model, twin, x = Counter(), Counter(), torch.randn(3)
    program = fuseline.capture(model, (x,))
    assert program.mutated == {"calls"}
    run = program.to_module()
    for _ in range(3):
        assert torch.equal(run(x), twin(x))
    assert model.calls.item() == 3


@torch.no_grad()
def test_symbolic_trace_with_leaf_modules_and_ties() -> None:
    model, ids = Tied(), torch.tensor([1, 5])
    program = Program.from_fx(torch.fx.symbolic_trace(model), (ids,))
    assert ops(program) == ["embedding", "linear", "relu", "linear"]
    assert len(program.lift()[1]) == 3
    run = program.to_module()
    model.embed.weight.mul_(3)
    assert torch.equal(run(ids), model(ids))


def test_symbolic_trace_in_training_gives_gradients() -> None:
    model, x = Mlp().double(), torch.randn(2, 8, dtype=torch.float64)
    program = Program.from_fx(torch.fx.symbolic_trace(model), (x,))
    assert program.training
    found = torch.autograd.grad(program.to_module()(x).sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-12


def test_a_program_of_a_backend_has_no_module() -> None:
    from dataclasses import replace

    program = replace(fuseline.capture(Mlp(), (torch.randn(2, 8),)), call=None)
    with pytest.raises(TypeError, match="came from a backend"):
        program.to_module()
