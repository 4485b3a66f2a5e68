"""What a step adds to a cache, in Triton's interpreter: the rotation, the rows that are written, those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.append import emit_append
from fuseline.compiler.ops import rotary
from tests.codegen.regions import BOUNDS, loaded, region


def step(counted: bool, turned: bool, queries: bool) -> Any:
    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, cos, sin, keys, values, at = given
        place = torch.arange(k.shape[2], device=k.device) + at if counted else at
        out = (rotary(q, cos, sin),) if queries else ()
        keys.index_copy_(2, place, rotary(k, cos, sin) if turned else k)
        values.index_copy_(2, place, v)
        return (*out, keys, values)

    return function


def made(function: Any, given: tuple[torch.Tensor, ...]) -> GraphModule:
    """The region, whose results are those of the writes, without inputs that nothing reads."""
    found = region(function, given)
    writes = [n for n in found.graph.nodes if n.target is torch.ops.aten.index_copy_.default]
    assert len(writes) == 2
    output = found.graph.output_node()
    output.args = ((*output.args[0][:-2], *writes),)  # type: ignore[index]
    for node in [n for n in found.graph.nodes if n.op == "placeholder" and not n.users]:
        found.graph.erase_node(node)
    found.recompile()
    return found


CASES = [  # batch, tokens, query heads, heads, channels, channels of values, counted, turned, queries
    (1, 1, 4, 2, 16, 16, True, True, True),
    (2, 3, 20, 10, 16, 16, True, True, True),
    (2, 1, 3, 3, 12, 20, True, True, True),
    (1, 4, 4, 4, 8, 8, False, True, True),
    (2, 2, 4, 2, 16, 8, False, True, False),
    (2, 5, 4, 2, 6, 6, True, False, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_are_those_of_the_naive_step(case: tuple[Any, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    batch, tokens, query_heads, heads, head, head_v, counted, turned, queries = case
    torch.manual_seed(0)
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    # heads as projections leave them: [B, S, H, D], seen as [B, H, S, D]
    q, k, v = (r(batch, tokens, n, d).transpose(1, 2) for n, d in ((query_heads, head), (heads, head), (heads, head_v)))
    cos, sin = r(1, 1, tokens, head), r(batch, 1, tokens, head)
    at = torch.tensor([3]) if counted else torch.tensor([9, 0, 4, 7])[:tokens]
    caches = (r(batch, heads, 10, head), r(batch, heads, 10, head_v))
    function = step(counted, turned, queries)
    given = (q, k, v, cos, sin, *caches, at)
    found = made(function, given)
    launcher = emit_append(found, "step")
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, tmp_path)
    names = dict(zip(("q", "k", "v", "cos", "sin", "keys", "values", "at"), given))
    read = [n for n in names if n not in ("q" if not queries else "", *(() if turned else ("cos", "sin", "q")))]
    ours = {n: names[n].clone(memory_format=torch.preserve_format) for n in read}
    results = call(*ours.values())
    wide = [x.double() if x.is_floating_point() else x.clone() for x in given]
    expected = function(*wide)
    assert len(results) == len(expected)
    for mine, true in zip(results, expected, strict=True):
        assert (mine.double() - true).abs().max() <= BOUNDS[dtype] * true.abs().max()
    assert results[-1] is ours["values"] and results[-2] is ours["keys"]  # written in place


def test_what_does_not_fit_is_not_written_and_shows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8)
    cos, sin, at = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8), torch.tensor([5])
    room = torch.randn(1, 2, 8, 8)  # the cache is the first six rows of it
    keys, values = room.clone()[:, :, :6], room.clone()[:, :, :6]
    launcher = emit_append(made(step(True, True, True), (q, k, v, cos, sin, keys, values, torch.tensor([0]))), "step")
    assert isinstance(launcher, Launcher)
    out, _, _ = loaded(launcher, tmp_path)(q, k, v, cos, sin, keys, values, at)
    assert not torch.equal(keys[:, :, 5], room[:, :, 5])
    assert torch.equal(keys._base[:, :, 6:], room[:, :, 6:]) and torch.equal(values._base[:, :, 6:], room[:, :, 6:])
    assert out[:, :, 0].isfinite().all() and out[:, :, 1].isnan().all()
