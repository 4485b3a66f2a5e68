"""Capture from Dynamo: what a backend is handed becomes a program in normal form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fuseline.compiler.capture import from_dynamo
from fuseline.compiler.program import Program
from fuseline.compiler.provenance import module_path, source_line
from tests.helpers.models import Mlp, Tied, error, ops, tiny_llama


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()


def through(model: Callable[..., Any], *args: Any, grad: bool = False, **options: Any) -> tuple[list[Program], Any]:
    """The programs that one call of `model` gives, and what that call returned when each program ran in eager."""
    found: list[Program] = []

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        program = from_dynamo(graph_module, inputs)
        found.append(program)
        return lambda *flat: program.run(flat)

    with torch.set_grad_enabled(grad):
        result = torch.compile(model, backend=backend, **options)(*args)
    return found, result


def test_weights_carry_the_names_of_named_parameters() -> None:
    model = Mlp()
    (program,), result = through(model, torch.randn(3, 8))
    assert set(program.sources) == {name for name, _ in model.named_parameters()}
    assert {n.meta["weight"].name for n in program.weights()} == set(program.sources)
    assert [source.tensor is model.get_parameter(name) for name, source in program.sources.items()] == [True] * 6


def test_buffers_are_weights_too_and_untrainable() -> None:
    model = torch.nn.BatchNorm1d(4).eval()
    (program,), _ = through(model, torch.randn(3, 4), grad=True)
    assert not program.sources["running_mean"].trainable and program.sources["weight"].trainable


def test_two_modules_in_one_function_do_not_share_names() -> None:
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    x = torch.randn(2, 4)
    (program,), result = through(lambda x: second(first(x)), x)
    assert len(program.sources) == 4
    assert torch.equal(result, second(first(x)))


def test_tied_parameters_are_one_lifted_input() -> None:
    model = Tied()
    (program,), _ = through(model, torch.tensor([[1, 2]]))
    _, expressions = program.lift()
    assert len(expressions) == 3  # the table, the body's weight and its bias


def test_dynamic_sizes_arrive_as_symbols_and_one_graph_serves_all() -> None:
    model = Mlp()
    x = torch.randn(5, 8)
    torch._dynamo.mark_dynamic(x, 0)
    found: list[Program] = []

    def backend(graph_module, inputs):
        found.append(from_dynamo(graph_module, inputs))
        return lambda *flat: found[0].run(flat)

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for rows in (5, 9, 2):
            y = torch.randn(rows, 8) if rows != 5 else x
            assert error(compiled(y), model(y)) < 1e-6
    assert len(found) == 1
    shapes = [getattr(n.meta["val"], "shape", ()) for n in found[0].placeholders]
    assert any(isinstance(size, torch.SymInt) for shape in shapes for size in shape)


def test_training_is_told_from_inference() -> None:
    model, x = Mlp(), torch.randn(2, 8)
    assert through(model, x, grad=True)[0][0].training
    torch.compiler.reset()
    assert not through(model, x)[0][0].training
    torch.compiler.reset()
    assert not through(model.requires_grad_(False), x, grad=True)[0][0].training


def test_gradients_flow_through_the_captured_graph() -> None:
    model = Mlp().double()
    x = torch.randn(3, 8, dtype=torch.float64)
    (program,), result = through(model, x, grad=True)
    found = torch.autograd.grad(result.sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-12


class Cache(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(4, 8))
        self.register_buffer("table", torch.ones(8))

    def forward(self, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(0, row, x)
        return self.keys.sum(0) * self.table


def test_inputs_that_are_written_to_are_declared_and_stay_inputs() -> None:
    model = Cache()
    (program,), result = through(model, torch.ones(1, 8), torch.tensor([2]))
    assert program.mutated == {"keys"}
    assert set(program.sources) == {"table"}
    assert "keys" in {n.name for n in program.placeholders}
    assert model.keys[2].eq(1).all() and model.keys.sum() == 8 and result.eq(1).all()


def test_a_static_cache_is_declared() -> None:
    from transformers import StaticCache

    model = tiny_llama()
    cache = StaticCache(config=model.config, max_cache_len=16)
    found: list[Program] = []

    def backend(graph_module, inputs):
        program = from_dynamo(graph_module, inputs)
        found.append(program)
        return lambda *flat: program.run(flat)

    ids = torch.tensor([[1, 2, 3, 4]])
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        compiled(ids[:, :3], past_key_values=cache)  # the cache makes its tensors during its first use
        actual = compiled(ids[:, 3:], past_key_values=cache).logits[:, -1]
    written = {name for program in found for name in program.mutated}
    assert len([name for name in written if name.endswith(("_keys", "_values"))]) == 4
    assert error(actual, expected) < 1e-6


def test_batch_norm_updates_its_statistics() -> None:
    model, twin = torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    x = torch.randn(6, 4)
    compiled = torch.compile(model, backend=lambda g, i: (lambda p: lambda *flat: p.run(flat))(from_dynamo(g, i)))
    for _ in range(2):
        assert torch.allclose(compiled(x), twin(x))
    assert torch.allclose(model.running_mean, twin.running_mean)
    assert model.num_batches_tracked == twin.num_batches_tracked == 2


class Autocast(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.inner.down(self.inner.up(x))
        return h.float() / 3


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_regions_keep_their_types(grad: bool) -> None:
    model, x = Autocast(), torch.randn(2, 8)
    (program,), result = through(model, x, grad=grad)
    linears = [n for n in program.graph.nodes if "linear" in str(n.target)]
    assert {n.meta["val"].dtype for n in linears} == {torch.bfloat16}
    assert all(n.meta["autocast"][0][:2] == ("cpu", torch.bfloat16) for n in linears)
    assert result.dtype == torch.float32 and torch.equal(result, model(x))
    assert not torch.is_autocast_enabled("cpu")


class Frozen(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = Mlp(), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = self.other(x)
        return self.inner(x) * weight


def test_a_no_grad_region_gives_no_gradient() -> None:
    model, x = Frozen(), torch.randn(2, 8)
    _, result = through(model, x, grad=True)
    result.sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for actual, expected in zip(found, (p.grad for p in model.parameters()), strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or error(actual, expected) < 1e-6


class Checkpointed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False).sum()


def test_activation_checkpointing_is_inlined() -> None:
    model, x = Checkpointed(), torch.randn(2, 8)
    (program,), result = through(model, x, grad=True)
    assert "linear" in ops(program) and not any("checkpoint" in name for name in ops(program))
    found = torch.autograd.grad(result, list(model.parameters()))
    expected = torch.autograd.grad(model(x), list(model.parameters()))
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-6


def test_nodes_know_their_line_and_their_module() -> None:
    model = Checkpointed()
    (program,), _ = through(model, torch.randn(2, 8))
    down = [n for n in program.graph.nodes if n.op == "call_function" and "linear" in str(n.target)][-1]
    assert module_path(down) == "inner.down"
    assert source_line(down) is not None and "models.py:" in source_line(down)


def test_nearly_all_nodes_of_a_model_keep_a_line_of_it() -> None:
    (program,), _ = through(tiny_llama(), torch.tensor([[1, 2, 3]]))
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    with_line = [n for n in calls if "modeling" in (source_line(n) or "") or "transformers" in (source_line(n) or "")]
    assert len(with_line) >= 0.99 * len(calls)
