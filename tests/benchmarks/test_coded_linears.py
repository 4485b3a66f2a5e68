"""The benchmark of coded linears: what it emits, and the bytes of its floor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from linears import coded


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(coded.SHAPES, "small", (64, 512))


@pytest.mark.parametrize("kind", coded.KINDS)
def test_every_kind_has_kernels(kind: str, tmp_path: Path) -> None:
    problem = coded.Problem("small", kind)
    few, many = (coded.emitted(problem, m, False, tmp_path) for m in (1, 256))
    assert [k.name for k in few[0].kernels][:1] == ["bench_few"] and len(many[0].kernels) == 1
    assert many[0].kernels[0].name in ("bench_some", "bench_many")
    assert (coded.quantizer(problem, tmp_path) is None) == (not problem.activations)


def test_the_floor_counts_every_byte() -> None:
    problem = coded.Problem("small", "w4a16")
    assert problem.least_bytes(3) == 64 * (256 + 4 * 2 + 4) + 3 * (512 * 2 + 64 * 2)
    assert sum(t.numel() * t.element_size() for t in problem.weight("cpu")) == 64 * (256 + 4 * 2 + 4)


def test_other_tiles_are_tried_once_each() -> None:
    found = list(coded.candidates(coded.Problem("small", "w4a16"), 256, True))
    assert len(found) == len(set(found)) > 5


def test_the_reference_is_that_of_the_codes() -> None:
    problem = coded.Problem("small", "w4a8")
    x, weight = problem.x(4, "cpu"), problem.weight("cpu")
    inputs = problem.coded(x)
    exact = problem.exact(inputs, weight)
    assert exact.dtype == torch.float64
    near = problem.product(*inputs, *weight).double()
    assert (near - exact).abs().max() / exact.abs().max() < 2e-2
