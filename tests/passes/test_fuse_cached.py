"""Attention over a cache of codes in `fuse`: before and after, and when it stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fuseline
from fuseline.compiler.cached import coded
from fuseline.compiler.ops import attention, cache_read, cache_write
from tests.codegen.cached_cases import NAMES, Cached
from tests.codegen.regions import error

CASE = Cached("fold", "int8:channel:g32", "int8:token", length=100, capacity=128, batch=2)


def step(read: Callable[..., Any]) -> torch.nn.Module:
    """One step of a cache that belongs to the caller; `read` attends: (q, keys, values, mask)."""

    class Step(torch.nn.Module):
        def forward(self, q: Any, x: Any, length: Any, mask: Any, *parts: Any) -> Any:
            sides = [list(parts[:3]) + [None, parts[3]], list(parts[4:7]) + [None, parts[7]]]
            before = length.clone()
            after = before + x.shape[2]
            length.copy_(after)
            schemes = (CASE.keys, CASE.values)
            for i in range(2):
                cache_write(*sides[i], x, before, schemes[i], CASE.block, bool(i))
            k, v = (cache_read(*sides[i], after, schemes[i], CASE.block, bool(i)) for i in range(2))
            return read(q, k, v, mask, parts)

    return Step()


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    parts = []
    for values in (False, True):
        side = CASE.side(values, dtype, "cpu", torch.randn(2, 2, 100, 64, dtype=dtype))
        parts += [getattr(side, name) for name in NAMES if name != "mean"]
    q, x = torch.randn(2, 4, 1, 64, dtype=dtype), torch.randn(2, 2, 1, 64, dtype=dtype)
    mask = (torch.arange(128) <= 100).expand(2, 1, 1, 128)
    return [q, x, torch.tensor(100), mask, *parts]


def fused(read: Callable[..., Any]) -> tuple[Any, Any, list[torch.Tensor]]:
    given = inputs()
    program = fuseline.capture(step(read), tuple(t.clone() for t in given))
    program, report = fuseline.Pipeline("fuse{allow_empty}").run(program, verification="full")
    return program, report["fuse"], given


def plain(q: Any, k: Any, v: Any, mask: Any, parts: Any) -> Any:
    return attention(q, k, v, mask, 0.125, "full")


def test_before_and_after() -> None:
    program, report, given = fused(plain)
    assert report.rules["cache"] == 1 and report.rules["attention over codes"] == 1
    names = [n.target._opname for n in program.graph.nodes if n.op == "call_function"]
    assert not {"cache_read", "cache_write", "attention"} & set(names)
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    assert error(program.to_module()(*ours), step(plain)(*theirs)) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))  # the cache, too
    assert int(ours[2]) == 101 and coded(101, CASE.window, CASE.block) == 64


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda q, k, v, mask, parts: attention(q, k, v, None, 0.125, "full"), "no mask hides the empty rows"),
        (lambda q, k, v, mask, parts: attention(q, v, k, mask, 0.125, "full"), "from a cache's values"),
        (
            lambda q, k, v, mask, parts: attention(q, k, v, parts[3].zero_()[:, :1, :1, :1] == 0, 0.125, "full"),
            "written to before its attention, by aten.zero_",
        ),
    ],
    ids=["no mask", "keys for values", "written in between"],
)
def test_refusals(read: Callable[..., Any], reason: str) -> None:
    program, report, given = fused(read)
    assert len(report.refused) == 1 and reason in next(iter(report.refused.values()))
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    assert error(program.to_module()(*ours), step(read)(*theirs)) < 1e-12


def test_what_else_reads_the_cache_still_gets_it_expanded() -> None:
    program, report, given = fused(lambda q, k, v, mask, parts: (plain(q, k, v, mask, parts), k.sum()))
    assert report.rules["cache"] == 1
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    expected = step(lambda q, k, v, mask, parts: (plain(q, k, v, mask, parts), k.sum()))(*theirs)
    for a, b in zip(program.to_module()(*ours), expected, strict=True):
        assert error(a, b) < 1e-12
