"""What a step adds to a cache becomes one region in `fuse`; nothing is moved past what would tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fuseline
from fuseline.compiler.ops import attention, rotary

Layer = Callable[..., torch.Tensor]


def layer(q: Any, k: Any, v: Any, cos: Any, sin: Any, keys: Any, values: Any, count: Any) -> torch.Tensor:
    """As transformers' static cache does it."""
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    at = torch.arange(k.shape[2]) + count
    count.add_(k.shape[2])
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    return attention(q, keys, values, None, 0.25, "causal", 3)


class Steps(torch.nn.Module):
    def __init__(self, one: Layer, layers: int = 1):
        super().__init__()
        self.one, self.layers = one, layers

    def forward(self, q: Any, k: Any, v: Any, cos: Any, sin: Any, *caches: Any) -> torch.Tensor:
        for i in range(self.layers):
            q = q + self.one(q, k, v, cos, sin, *caches[3 * i : 3 * i + 3])
        return q


def inputs(layers: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(0)
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    given = [r(2, 4, 2, 8), r(2, 2, 2, 8), r(2, 2, 2, 8), r(1, 1, 2, 8), r(1, 1, 2, 8)]
    for _ in range(layers):
        given += [r(2, 2, 12, 8), r(2, 2, 12, 8), torch.tensor([3])]
    return given


def fused(one: Layer, layers: int = 1) -> tuple[list[list[str]], list[str]]:
    """Ops of each region that writes to a cache, and those outside of regions; results and caches are eager's."""
    given = inputs(layers)
    program = fuseline.capture(Steps(one, layers), tuple(t.clone() for t in given))
    program, _ = fuseline.Pipeline("fuse{allow_empty}").run(program, verification="full")
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    out, expected = program.to_module()(*ours), Steps(one, layers)(*theirs)
    assert (out - expected).abs().max() < 1e-12 * expected.abs().max()
    assert all((a - b).abs().max() <= 1e-12 * b.abs().max() for a, b in zip(ours, theirs, strict=True))
    calls = [n for n in program.graph.nodes if n.op == "call_module" and str(n.target).startswith("append")]
    found = []
    for call in calls:
        region = program.module.get_submodule(call.target)
        found.append(sorted(n.target._opname for n in region.graph.nodes if n.op == "call_function"))
    return found, [getattr(n.target, "_opname", "") for n in program.graph.nodes if n.op == "call_function"]


WHOLE = ["add", "arange", "index_copy_", "index_copy_", "rotary", "rotary"]


def test_a_layer_is_one_region() -> None:
    regions, outside = fused(layer)
    assert regions == [WHOLE]
    assert not {"index_copy_", "rotary", "arange"} & set(outside)


def test_counts_go_up_together() -> None:
    """Each layer counts for itself; nothing looks at a count behind its layer."""
    regions, outside = fused(layer, 3)
    assert regions == [WHOLE] * 3
    assert "add_" not in outside and outside.count("_foreach_add_") == 1


def read_between(q: Any, k: Any, v: Any, cos: Any, sin: Any, keys: Any, values: Any, count: Any) -> torch.Tensor:
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    at = torch.arange(k.shape[2]) + count
    count.add_(k.shape[2])
    k = k * count  # the count as it is now
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    return attention(q, keys, values, None, 0.25, "causal", 3)


def read_by_another_name(q: Any, k: Any, v: Any, cos: Any, sin: Any, keys: Any, values: Any, count: Any) -> Any:
    q, k, view = rotary(q, cos, sin), rotary(k, cos, sin), count.view(1, 1)
    at = torch.arange(k.shape[2]) + count
    count.add_(k.shape[2])
    k = k * view
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    return attention(q, keys, values, None, 0.25, "causal", 3)


def read_behind(q: Any, k: Any, v: Any, cos: Any, sin: Any, keys: Any, values: Any, count: Any) -> torch.Tensor:
    return layer(q, k, v, cos, sin, keys, values, count) * count


def seen_between(q: Any, k: Any, v: Any, cos: Any, sin: Any, keys: Any, values: Any, count: Any) -> torch.Tensor:
    at = torch.arange(k.shape[2]) + count
    keys.index_copy_(2, at, k)
    total = keys.sum()
    values.index_copy_(2, at, v * total)
    return attention(q, keys, values, None, 0.25, "causal", 3)


def apart(q: Any, k: Any, v: Any, cos: Any, sin: Any, keys: Any, values: Any, count: Any) -> torch.Tensor:
    at = torch.arange(k.shape[2])
    keys.index_copy_(2, at + count, k)
    values.index_copy_(2, at, v)
    return attention(q, keys, values, None, 0.25, "causal", 3)


def from_queries(q: Any, k: Any, v: Any, cos: Any, sin: Any, keys: Any, values: Any, count: Any) -> torch.Tensor:
    """The values are made from the turned queries, which therefore come before the region."""
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    at = torch.arange(k.shape[2]) + count
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v + q[:, :2].cumsum(2))
    return attention(q, keys, values, None, 0.25, "causal", 3)


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (read_between, [["index_copy_", "index_copy_"]]),
        (read_by_another_name, [["index_copy_", "index_copy_"]]),
        (read_behind, [WHOLE]),
        (seen_between, []),
        (apart, []),
        (from_queries, [["add", "arange", "index_copy_", "index_copy_"]]),
    ],
)
def test_what_tells_stays_where_it_is(one: Layer, expected: list[list[str]]) -> None:
    regions, outside = fused(one)
    assert regions == expected
    assert "_foreach_add_" not in outside


def test_writes_that_follow_each_other_go_in_pairs() -> None:
    """Four writes by the same positions, read only behind the last."""

    def four(q: Any, k: Any, v: Any, cos: Any, sin: Any, *caches: Any) -> torch.Tensor:
        at = torch.arange(k.shape[2]) + caches[2]
        for cache, x in zip((caches[0], caches[1], caches[3], caches[4]), (k, v, k, v)):
            cache.index_copy_(2, at, x)
        first, second = (attention(q, caches[i], caches[i + 1], None, 0.25, "causal", 3) for i in (0, 3))
        return first + second

    class Once(torch.nn.Module):
        def forward(self, *given: Any) -> torch.Tensor:
            return four(*given)

    given = inputs(2)
    program = fuseline.capture(Once(), tuple(t.clone() for t in given))
    program, report = fuseline.Pipeline("fuse{allow_empty}").run(program, verification="full")
    assert report["fuse"].rules["cache append"] == 2
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    assert torch.allclose(program.to_module()(*ours), four(*theirs), rtol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
