"""Fake quantization's kernels on a GPU: codes of the naive twins, gradients, and a training step through both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fuseline
from fuseline.compiler.formats import FORMATS
from fuseline.compiler.formats.learned import initial_range
from fuseline.compiler.ops import fake_quantize, fake_quantize_backward, round_through
from fuseline.models.decoder import TinyDecoder
from fuseline.runtime import fake_quantize as launches

pytestmark = pytest.mark.gpu

FORMS = ("int8", "int4", "int3", "midrise4", "midrise2", "ternary", "binary")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows,channels,group", [(64, 4096, 4096), (33, 576, 64), (7, 14336, 14336), (5, 100, 4)])
@pytest.mark.parametrize("format", FORMS)
def test_against_the_naive_twins(format: str, rows: int, channels: int, group: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, channels, device="cuda").to(dtype)
    alpha = initial_range(x.unflatten(-1, (-1, group)), FORMATS[format].element).squeeze(-1)
    alpha *= torch.rand_like(alpha) + 0.4
    grad = torch.randn_like(x)
    assert torch.equal(launches.forward(x, alpha, format, group), fake_quantize.naive(x, alpha, format, group))
    found = launches.backward(grad, x, alpha, format, group)
    wanted = fake_quantize_backward.naive(grad, x, alpha, format, group)
    assert torch.equal(found[0], wanted[0])
    assert (found[1] - wanted[1]).abs().max() <= 1e-3 * wanted[1].abs().max()
    again = launches.backward(grad, x, alpha, format, group)
    assert torch.equal(found[1], again[1])  # no atomics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "scheme,weights", [("int8", False), ("int4:g64", False), ("int4:sym:g128", True), ("int2:sym", True)]
)
def test_ranges_of_the_values_themselves(scheme: str, weights: bool, dtype: torch.dtype) -> None:
    x = torch.randn(3, 65, 1536, device="cuda").to(dtype)
    assert torch.equal(launches.through(x, scheme, weights), round_through.naive(x, scheme, weights))


@pytest.mark.parametrize("weights,method", [("midrise2", "paretoq"), ("int4:sym", "rtn"), ("binary", "paretoq")])
def test_training_is_that_of_the_cpu(weights: str, method: str) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = TinyDecoder(64, 64, 2, 4, 2).to(device)
        ids = torch.arange(64).view(2, 32).to(device)
        pipeline = f"raise,quantize{{weights={weights},activations=int8,method={method}}}"
        qat = fuseline.prepare_qat(model, pipeline, ids)
        optimizer = torch.optim.SGD(qat.parameters(), 0.1)
        found = []
        for _ in range(3):
            loss = F.cross_entropy(qat(ids).flatten(0, 1), ids.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
        qat.eval()
        with torch.no_grad():
            expected = qat(ids)
            converted = fuseline.convert(qat)(ids)
        assert (converted - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
