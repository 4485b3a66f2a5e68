"""The kernel of fused losses against the op's formula, on poisoned results; and whole losses by it, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fuseline.compiler.ops import linear_cross_entropy, linear_cross_entropy_gradients
from fuseline.compiler.ops.linear_cross_entropy import capped, rows
from fuseline.runtime import linear_cross_entropy as runs

SHAPES = ((4, 5), (3, 128), (3, 300), (2, 8192), (2, 8500))  # rows, vocabulary
FORMS = ((0.0, 0.0, 1.0), (0.1, 0.0, 0.7), (0.0, 3.0, 1.0), (0.2, -5.0, -1.3))  # smoothing, soft cap, scale


def case(count: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(count + vocabulary)
    target = torch.randint(0, vocabulary, (count,))
    target[-1], target[0] = -100, vocabulary - 1
    return (3 * torch.randn(count, vocabulary)).to(dtype), target, torch.rand(count) + 0.5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(shape: tuple[int, int], form: tuple[float, float, float], dtype: torch.dtype) -> None:
    smoothing, cap, scale = form
    logits, target, factors = case(*shape, dtype)
    values = capped(logits.double(), scale, cap)
    losses, gradient, counts = rows(values, target, None, -100, smoothing)
    gradient *= (factors * counts * scale).unsqueeze(-1)
    gradient = gradient * (1 - (values / cap).square()) if cap else gradient
    for wants in (True, False):
        buffer = torch.full((shape[0], shape[1] + 3), float("nan"), dtype=dtype)  # rows with a stride of their own
        inside, found = buffer[:, : shape[1]], torch.full((shape[0],), float("nan"))
        inside.copy_(logits)
        runs.launch(inside, target, factors, found, -100, smoothing, scale, cap, wants)
        assert (found - losses * counts).abs().max() < 2e-5
        bound = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert (inside - (gradient if wants else logits.double())).abs().max() <= bound * gradient.abs().max()
        assert buffer[:, shape[1] :].isnan().all()


def test_extreme_logits() -> None:
    """Large logits do not overflow, and −∞ is a token that never comes; the sum starts from a block of −∞."""
    logits = torch.full((2, 8300), float("-inf"))
    logits[:, 8192:8200] = torch.arange(8) * 1e4
    logits[1] += 3e4
    target, losses = torch.tensor([8199, 8198]), torch.full((2,), float("nan"))
    expected, gradient, _ = rows(logits.double(), target, None, -100, 0.0)
    runs.launch(logits, target, torch.ones(2), losses, -100, 0.0, 1.0, 0.0, True)
    assert torch.allclose(losses.double(), expected) and (logits - gradient).abs().max() < 1e-6


def poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same memory, NaN until it is written."""

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    return poisoned


@pytest.mark.parametrize("reduction", (0, 1, 2))
@pytest.mark.parametrize("classes", (False, True))
def test_whole_losses(reduction: int, classes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_over_rows", runs.launch)
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
    torch.manual_seed(0)
    x, w, b = torch.randn(7, 16), torch.randn(300, 16), torch.randn(300)
    target = torch.tensor([1, -100, 299, 0, 4, -100, 8])
    weights = torch.rand(300) if classes else None
    above = torch.rand(7) if reduction == 0 else None
    arguments = (x, w, b, target, weights, above, True, True, True, reduction, -100, 0.0, 0.5, 3.0)
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    for chunk in (0, 3):
        found = linear_cross_entropy_gradients(*arguments, None, chunk)
        for a, e in zip(found, linear_cross_entropy_gradients.naive(*exact), strict=True):
            assert (a - e).abs().max() <= 3e-6 * e.abs().max()
        forward = linear_cross_entropy(x, w, b, target, weights, *arguments[9:], None, chunk)
        assert torch.equal(forward, found[0])


@pytest.mark.parametrize("reduction", (0, 1))
@pytest.mark.parametrize("by_kernel", (False, True))
def test_small_gradients_in_float16(by_kernel: bool, reduction: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities over the number of rows, 4e-8 here, are below what float16 holds, and are stored larger."""
    if by_kernel:
        monkeypatch.setattr(runs, "_over_rows", runs.launch)
    torch.manual_seed(0)
    x, w, b = (t.half() for t in (torch.randn(40, 16), torch.randn(700, 16) / 16, torch.randn(700) / 16))
    target = torch.randint(0, 700, (40,))
    above = torch.rand(40) * 1e-3 if reduction == 0 else None
    arguments = (x, w, b, target, None, above, True, True, True, reduction, -100, 0.1, 1e-3 if reduction else 1.0, 20.0)
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    truth = linear_cross_entropy_gradients.naive(*exact)
    for found in (linear_cross_entropy_gradients(*arguments), linear_cross_entropy_gradients.naive(*arguments)):
        assert all(g.dtype == torch.float32 for g in found[1:])
        assert all(((g - t).norm() / t.norm()).item() < 1e-3 for g, t in zip(found[1:], truth[1:], strict=True))


def test_float16_holds_the_largest_gradients() -> None:
    """Factors may be of any size; a gradient from above that is infinite stays so (GradScaler looks for it)."""
    x, w, target = torch.ones(4, 8).half(), torch.randn(6, 8).half(), torch.tensor([0, 1, 2, 3])
    for above in (1e37, 1e-37, 0.0):
        upstream = torch.full((4,), above)
        _, dx, dw, _ = linear_cross_entropy_gradients(x, w, None, target, None, upstream, True, True, False, 0)
        assert dx.isfinite().all() and dw.isfinite().all() and bool(dx.any()) == (above > 0)
    upstream = torch.tensor([1.0, float("inf"), 1.0, 1.0])
    _, dx, dw, _ = linear_cross_entropy_gradients(x, w, None, target, None, upstream, True, True, False, 0)
    assert not dx.isfinite().all() and not dw.isfinite().all()
