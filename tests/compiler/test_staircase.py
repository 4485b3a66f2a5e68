"""`fuseline::staircase` and its training twin, against N2UQ's loop over thresholds."""

from __future__ import annotations

import pytest
import torch

import fuseline
from fuseline import UserError
from fuseline.compiler.ops import fake_staircase, staircase
from fuseline.compiler.ops.staircase import begun, placed
from fuseline.compiler.schemes import Scheme


def published(x, widths, start, factor, out, bits):
    """N2UQ's forward and its line for the backward, threshold by threshold; its levels begin at 0."""
    count = 2**bits - 1
    interval = 2.0 / count
    y = x * factor
    forward, line, above = torch.zeros_like(y), torch.zeros_like(y), start
    for k in range(count):
        forward = torch.where(y > above + widths[k] / 2, interval * (k + 1), forward)
        line = torch.where(y > above, interval / widths[k] * (y - above) + interval * k, line)
        above = above + widths[k]
    line = torch.where(y > above, torch.full_like(y, 2.0), line)
    return (forward.detach() + line - line.detach()) * out


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_values_and_gradients_are_n2uqs(bits: int) -> None:
    torch.manual_seed(bits)
    count = 2**bits - 1
    x = (torch.randn(6, 50) * 1.5).double()
    widths = (torch.rand(count, dtype=torch.float64) + 0.3) * 2 / count
    given = [x, widths, *(torch.tensor([v], dtype=torch.float64) for v in (0.0, 0.8, 1.3))]
    ours, theirs = ([v.clone().requires_grad_() for v in given] for _ in range(2))
    made = fake_staircase(ours[0], torch.cat(ours[1:]), bits)
    expected = published(*theirs, bits)
    assert (made - expected).abs().max() < 1e-12
    grad = torch.randn_like(x)
    made.backward(grad)
    expected.backward(grad)
    for i in (0, 1, 3, 4):
        assert (ours[i].grad - theirs[i].grad).abs().max() < 1e-9 * theirs[i].grad.abs().max()
    moved = theirs[2].grad + (grad * 1.3).sum()  # the begin moves our levels, too
    assert (ours[2].grad - moved).abs() < 1e-9 * moved.abs()
    assert torch.equal(staircase(x, *placed(torch.cat(given[1:]), bits)), made)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_training_sees_what_is_run(dtype: torch.dtype) -> None:
    x = torch.randn(4, 33).to(dtype)
    steps = torch.tensor(begun(3, 2.0, True)) + 0.02 * torch.randn(2**3 + 2)
    assert torch.equal(fake_staircase(x, steps, 3), staircase(x, *placed(steps, 3)))


def test_where_it_starts() -> None:
    x = torch.linspace(-2, 2, 41)
    signed = fake_staircase(x, torch.tensor(begun(2, 2.0, True)), 2).unique()
    assert torch.allclose(signed, torch.tensor([-2.0, -2 / 3, 2 / 3, 2.0]), atol=1e-6)
    positive = fake_staircase(x, torch.tensor(begun(2, 2.0, False)), 2).unique()
    assert torch.allclose(positive, torch.tensor([0.0, 2 / 3, 4 / 3, 2.0]), atol=1e-6)


def test_its_text() -> None:
    scheme = Scheme.parse("int3:thresholds", weights=False)
    assert scheme.thresholds and str(scheme) == "int3:thresholds"
    assert Scheme.parse(str(scheme), weights=False) == scheme
    for text in ("int8:thresholds", "fp4:thresholds", "int2:g8:thresholds"):
        with pytest.raises(UserError, match="thresholds are learned for integers of 2 to 4 bits") as caught:
            Scheme.parse(text, weights=False)
        assert "int2:thresholds" in str(caught.value)
    with pytest.raises(UserError, match="unknown part 'thresholds'"):
        Scheme.parse("int2:thresholds", weights=True)
    with pytest.raises(UserError, match="thresholds are learned for activations"):
        fuseline.Pipeline("quantize{keys=int4:thresholds}")
    with pytest.raises(UserError, match="takes what training found"):
        fuseline.optimize(torch.nn.Linear(4, 4), "quantize{activations=int2:thresholds}")
