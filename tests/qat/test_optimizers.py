"""PARQ and WinQ round an optimizer of PyTorch's: their steps against the formulas, and what they end on."""

from __future__ import annotations

import math

import pytest
import torch

import fuseline
from fuseline import UserError
from fuseline.compiler.ops import fake_quantize, round_through
from fuseline.qat import PARQ, ConfidenceAnnealing, WinQ

GRIDS = {"int4:sym": 7, "int3:sym": 3, "midrise2": 1.5, "ternary": 1, "binary": 1}
"""Scheme → the largest number."""


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


X = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
Y = torch.randn(16, 8, generator=torch.Generator().manual_seed(4))


def prepared(weights: str, method: str) -> fuseline.qat.QuantizationAware:
    torch.manual_seed(0)
    return fuseline.prepare_qat(Linear(), f"quantize{{weights={weights},method={method}}}", (X,))


def backward(qat: torch.nn.Module) -> float:
    loss = (qat(X) - Y).square().mean()
    loss.backward()
    return loss.item()


def levels(weights: str, scale: torch.Tensor) -> torch.Tensor:
    """Every number of a row's grid, [rows, levels]."""
    top = GRIDS[weights]
    low, step = (-top - 1 if weights.startswith("int") else -top), (2 if weights == "binary" else 1)
    return scale * torch.arange(low, top + 1e-6, step)


def annealed(z: torch.Tensor, grid: torch.Tensor, rho: float) -> torch.Tensor:
    """PARQ's proximal map, element by element."""
    out = torch.empty_like(z)
    for row in range(len(z)):
        for column in range(z.shape[1]):
            value, numbers = z[row, column], grid[row]
            if value <= numbers[0] or value >= numbers[-1]:
                out[row, column] = numbers[0] if value <= numbers[0] else numbers[-1]
                continue
            after = int((numbers <= value).sum())
            low, high = numbers[after - 1], numbers[after]
            centre = (low + high) / 2
            out[row, column] = (centre + (value - centre) / rho).clamp(low, high)
    return out


@pytest.mark.parametrize("weights", GRIDS)
def test_parq_steps(weights: str) -> None:
    """Against a latent weight that plain SGD steps, at the gradients of the stored one."""
    qat = prepared(weights, "parq")
    optimizer = PARQ(torch.optim.SGD(qat.parameters(), 0.1), qat, start=2, end=6, steepness=4.0, every=1)
    weight = qat.model.fc.weight
    latent = weight.detach().clone()
    for number in range(1, 9):
        optimizer.zero_grad()
        backward(qat)
        latent = latent - 0.1 * weight.grad
        optimizer.step()
        mean, largest = latent.abs().mean(1, keepdim=True), latent.abs().amax(1, keepdim=True)
        bits = {"ternary": 2, "binary": 1}.get(weights) or int(weights.removesuffix(":sym")[-1])
        uniform = torch.minimum(bits * mean, largest) / GRIDS[weights]
        grid = levels(weights, {"ternary": 1.1 * mean, "binary": mean}.get(weights, uniform))
        if number < 2:
            assert torch.allclose(weight, latent, atol=1e-7) and optimizer.inverse_slope == 1
        elif number < 6:
            sigmoid = lambda part: 1 / (1 + math.exp(4.0 * (part - 0.5)))
            rho = (sigmoid((number - 2) / 4) - sigmoid(1)) / (sigmoid(0) - sigmoid(1))
            assert optimizer.inverse_slope == pytest.approx(rho)
            assert torch.allclose(weight, annealed(latent, grid, rho), atol=1e-5)
        else:
            nearest = (latent.unsqueeze(-1) - grid.unsqueeze(1)).abs().argmin(-1)
            assert torch.allclose(weight, grid.gather(1, nearest), atol=1e-6)


@pytest.mark.parametrize("weights", GRIDS)
def test_parq_ends_on_the_grid(weights: str) -> None:
    qat = prepared(weights, "parq")
    optimizer = PARQ(torch.optim.AdamW(qat.parameters(), 0.02), qat, start=5, end=40)
    first = last = 0.0
    for number in range(60):
        optimizer.zero_grad()
        last = backward(qat)
        first = first or last
        if number == 20:
            with pytest.raises(UserError, match=r"do not lie on their grid") as caught:
                fuseline.convert(qat)
            assert "fuseline.qat.PARQ" in str(caught.value)
            qat.train()
        optimizer.step()
    assert last < first
    qat.eval()
    with torch.no_grad():
        expected = qat(X)
        found = fuseline.convert(qat, target="eager")(X)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_parq_state_is_saved() -> None:
    runs = []
    for stop in (False, True):
        qat = prepared("midrise2", "parq")
        make = lambda qat=qat: PARQ(torch.optim.AdamW(qat.parameters(), 0.02), qat, start=2, end=10)
        optimizer = make()
        for number in range(12):
            if stop and number == 6:
                state, weights = optimizer.state_dict(), qat.state_dict()
                optimizer = make()
                optimizer.load_state_dict(state)
                qat.load_state_dict(weights)
            optimizer.zero_grad()
            backward(qat)
            optimizer.step()
        runs.append(qat.model.fc.weight.detach().clone())
    assert torch.equal(*runs)


def test_closures_and_schedulers() -> None:
    qat = prepared("midrise2", "parq")
    optimizer = PARQ(torch.optim.SGD(qat.parameters(), 0.1), qat, start=0, end=4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure() -> float:
        optimizer.zero_grad()
        return backward(qat)

    for _ in range(2):
        assert isinstance(optimizer.step(closure), float)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.base.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("method", ("paretoq", "rtn"))
def test_winq_resets(method: str) -> None:
    qat = prepared("midrise2", method)
    weight = qat.model.fc.weight
    optimizer = WinQ(torch.optim.SGD(qat.parameters(), 0.1), qat, every=2, mix=0.25, until=4)
    mirror = prepared("midrise2", method)
    plain = torch.optim.SGD(mirror.parameters(), 0.1)
    for number in range(1, 7):
        for module, each in ((qat, optimizer), (mirror, plain)):
            each.zero_grad()
            backward(module)
            each.step()
        other = mirror.model.fc.weight
        if number in (2, 4):
            before = other.detach()
            rounded = (
                round_through(before, "midrise2", True)
                if method == "rtn"
                else fake_quantize(before, mirror.ranges["fc_weight"].detach(), "midrise2", 24)
            )
            assert torch.allclose(weight, 0.75 * before + 0.25 * rounded, atol=1e-6)
            with torch.no_grad():
                other.copy_(weight)
        assert torch.allclose(weight, other, atol=1e-6)


def test_noise_is_for_training_alone() -> None:
    qat = prepared("int4:sym", "paretoq")
    WinQ(torch.optim.SGD(qat.parameters(), 0.1), qat, noise=0.5)
    assert not torch.equal(qat(X), qat(X))
    qat.eval()
    assert torch.equal(qat(X), qat(X))


def test_optimizers_without_weights_are_refused() -> None:
    paretoq, parq = prepared("midrise2", "paretoq"), prepared("midrise2", "parq")
    base = torch.optim.SGD(paretoq.parameters(), 0.1)
    with pytest.raises(UserError, match="PARQ has no weights to draw to a grid"):
        PARQ(base, paretoq, start=0, end=2)
    with pytest.raises(UserError, match="WinQ has no rounded weights"):
        WinQ(base, parq)
    with pytest.raises(UserError, match="anneals from step 3 to 2"):
        PARQ(base, parq, start=3, end=2)
    with pytest.raises(UserError, match="resets every 0 steps"):
        WinQ(base, paretoq, every=0)


def test_computed_weights_are_refused() -> None:
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.fc = torch.nn.Embedding(9, 16), torch.nn.RMSNorm(16), torch.nn.Linear(16, 9)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.fc(self.norm(self.embed(ids)))

    text = "raise,rotate{r1},quantize{weights=midrise2,method=parq,only=fc}"
    qat = fuseline.prepare_qat(Normed(), text, torch.arange(9).view(1, 9))
    with pytest.raises(UserError, match="is computed from"):
        PARQ(torch.optim.SGD(qat.parameters(), 0.1), qat, start=0, end=2)


@pytest.mark.parametrize("method", ("paretoq", "rtn"))
@pytest.mark.parametrize("weights", GRIDS)
def test_sure_weights_stay(weights: str, method: str) -> None:
    """A weight may move only where a nudge of the boundary's size would change its code."""
    qat = prepared(weights, method)
    weight, boundary = qat.model.fc.weight, 0.05
    before = weight.detach().clone()
    optimizer = ConfidenceAnnealing(torch.optim.SGD(qat.parameters(), 0.1), qat, boundary=boundary)
    backward(qat)
    optimizer.step()
    if method == "rtn":
        mean, largest = (f(before.abs(), 1) for f in (torch.mean, torch.amax))
        scale = {"midrise2": mean, "ternary": mean, "binary": mean}
        scale = scale.get(weights, largest / GRIDS[weights])
    else:
        unit = {"midrise2": 2, "ternary": 1.5}.get(weights, 1)
        scale = prepared(weights, method).ranges["fc_weight"].detach().squeeze(1) / unit
    grid = levels(weights, scale.unsqueeze(1))
    code = lambda w: (w.unsqueeze(-1) - grid.unsqueeze(1)).abs().argmin(-1)
    nudge = boundary * (2 if weights == "binary" else 1) * scale.unsqueeze(1)
    unsure = code(before - nudge) != code(before + nudge)
    assert 0 < unsure.float().mean() < 0.3
    assert torch.equal((weight != before), unsure & (weight.grad != 0))


def test_annealing_by_confidence_says_what_it_needs() -> None:
    qat = prepared("int4:sym", "paretoq")
    decaying = torch.optim.AdamW(qat.parameters(), 0.1)
    with pytest.raises(UserError, match="weight decay moves weights"):
        ConfidenceAnnealing(decaying, qat)
    with pytest.raises(UserError, match="is not between 0 and 0.5"):
        ConfidenceAnnealing(torch.optim.SGD(qat.parameters(), 0.1), qat, boundary=0.0)
    fp4 = prepared("fp4", "rtn")
    with pytest.raises(UserError, match="grids of equal steps"):
        ConfidenceAnnealing(torch.optim.SGD(fp4.parameters(), 0.1), fp4)
