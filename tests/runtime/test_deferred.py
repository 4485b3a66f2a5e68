"""Deferred results: what is known costs nothing, whatever reads them gets eager's elements, and none is stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fuseline.compiler.deferred import Tail
from fuseline.compiler.errors import FuselineError
from fuseline.runtime.deferred import Deferred, deferred

aten = torch.ops.aten


def tail(x: torch.Tensor, weight: torch.Tensor, steps: tuple[Any, ...] = ()) -> Deferred:
    """x @ weightᵀ and what follows, to be computed later."""
    return deferred(Tail(None, None, None, x.dtype, steps), x, weight, None)  # type: ignore[arg-type]


@pytest.fixture
def parts() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a method": lambda y: y.argmax(-1),
    "a function": lambda y: torch.softmax(y, -1),
    "an operator": lambda y: 2 * y + y,
    "an item": lambda y: y[0, 1],
    "numpy": lambda y: torch.from_numpy(np.asarray(y.detach())),
    "a list": lambda y: torch.tensor(y.tolist()),
    "detached": lambda y: y.detach(),
    "on the CPU": lambda y: y.cpu(),
    "an op of ATen": lambda y: torch.ops.aten.relu.default(y),
    "an op of ours": lambda y: torch.ops.fuseline.glu(y, y, "silu"),
    "a list of tensors": lambda y: torch.cat([y, y], 1),
    "a keyword": lambda y: torch.add(input=y, other=y),
    "copied": lambda y: copy.deepcopy(y.detach()),
    "another type": lambda y: y.double() + 0,
    "by a compiled function": lambda y: torch.compile(lambda z: z * 2 + 1, backend="eager")(y),
    "under no_grad": lambda y: torch.no_grad()(lambda: y.sum())(),
    "in place": lambda y: y.mul_(2),
    "an iteration": lambda y: torch.stack(list(y)),
}


@pytest.mark.parametrize("read", READS)
def test_whoever_reads_it_gets_the_elements(read: str, parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = parts
    expected, found = READS[read](x @ weight.t()), READS[read](tail(x, weight))
    assert type(found) is torch.Tensor and found.dtype == expected.dtype
    assert torch.allclose(found, expected, atol=1e-6) and found.requires_grad == expected.requires_grad


def test_what_is_known_costs_nothing(parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    y = tail(*parts)
    assert isinstance(y, torch.Tensor) and torch.is_tensor(y)
    assert y.shape == y.size() == (2, 3, 5) and y.size(-1) == 5 and y.ndim == y.dim() == 3 and len(y) == 2
    assert y.dtype == torch.float32 and y.device.type == "cpu" and not y.is_cuda and y.numel() == 30
    assert y.is_floating_point() and y.requires_grad
    assert y._value is None
    wide = y.double()
    assert isinstance(wide, Deferred) and wide.dtype == torch.float64 and y.float() is y and y._value is None
    assert wide.sum().dtype == torch.float64 and y._value is not None


def test_gradients_flow_whatever_the_mode_it_was_first_read_in(parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = parts
    expected = torch.autograd.grad((x @ weight.t()).square().sum(), [x, weight])
    y = tail(x, weight)
    with torch.inference_mode():
        assert not y.sum().requires_grad
    found = torch.autograd.grad(y.square().sum(), [x, weight])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_steps_run_in_the_types_of_the_graph(parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = (p.detach().bfloat16() for p in parts)
    steps = (
        (aten.div.Tensor, (3.0,), {}, torch.bfloat16),
        (aten.tanh.default, (), {}, torch.bfloat16),
        (aten.to.dtype, (torch.float32,), {}, torch.float32),
    )
    y = tail(x, weight, steps)
    assert y.dtype == torch.float32
    expected = torch.tanh((x @ weight.t()) / 3.0).float()
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(y, expected)


def test_an_edited_parameter_is_noticed(parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = parts
    early, late = tail(x, weight), tail(x, weight)
    before = early.sum()
    torch.optim.SGD([weight.requires_grad_()], 0.1).step()  # no gradient: nothing is edited
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 0.1).step()
    assert torch.equal(early.sum(), before)  # it was there
    with pytest.raises(FuselineError, match="the model was changed since") as caught:
        late.sum()
    assert "logits=kept" in str(caught.value)


def test_hooks_wait_for_the_elements(parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    seen: list[torch.Tensor] = []
    y = tail(*parts)
    y.register_hook(seen.append)
    y.register_hook(lambda grad: seen.append(None)).remove()
    assert y._value is None
    y.sum().backward()
    assert len(seen) == 1 and seen[0].shape == (2, 3, 5)
