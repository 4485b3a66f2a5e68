"""Kernels that begin while those before them end, on a GPU: the bits of plain launches, launched and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fuseline
from fuseline.runtime import dependent

pytestmark = pytest.mark.gpu
WIDTH = 1024


class Chain(nn.Module):
    """Products that each read what the one before has just written, partial sums in between."""

    def __init__(self, depth: int = 12):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip(self.layers, self.norms):
            x = x + torch.tanh(layer(norm(x)))
        return x


def chain(pipeline: str) -> Any:
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        return fuseline.optimize(Chain().to("cuda", torch.bfloat16).eval(), pipeline)


@pytest.fixture
def early_launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What launches began early."""
    if not dependent.possible("cuda", 10 * torch.cuda.get_device_capability()[0]):
        pytest.skip("this GPU or its driver launches kernels one after the other")
    found, real = [], dependent.constants
    monkeypatch.setattr(dependent, "constants", lambda early: found.append(early) or real(early))
    return found


@pytest.mark.parametrize("pipeline", ["raise,fuse", "raise,quantize{weights=int4:g128},fuse"])
@torch.no_grad()
def test_the_bits_of_plain_launches(
    pipeline: str, early_launches: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inputs = [torch.randn(1, 1, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(100)]
    with monkeypatch.context() as plainly:
        plainly.setattr(dependent, "possible", lambda *_: False)
        plainly.setenv("FUSELINE_CACHE", str(tmp_path / "plain"))  # modules, and what launches them, of its own
        plain = chain(pipeline)
        expected = [plain(x).clone() for x in inputs]
        assert not any(early_launches)
    monkeypatch.setenv("FUSELINE_CACHE", str(tmp_path / "early"))
    model = chain(pipeline)
    for x, y in zip(inputs * 3, expected * 3):  # launched at first, then as a graph is replayed
        torch.empty(1 << 22, device="cuda").fill_(float("nan"))
        assert torch.equal(model(x), y)
    assert any(early_launches)


@torch.no_grad()
def test_other_kernels_find_the_results(early_launches: list[Any]) -> None:
    """PyTorch's own kernels, in the same stream and in another one that waits for it."""
    model, other = chain("raise,quantize{weights=int4:g128},fuse"), torch.cuda.Stream()
    for _ in range(50):
        x = torch.randn(1, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
        first = model(x)
        same = first.float().sum()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            elsewhere = first.float().sum()
        torch.cuda.current_stream().wait_stream(other)
        torch.cuda.synchronize()
        assert same == elsewhere == first.float().sum()
