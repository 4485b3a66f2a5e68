"""fuse: what becomes one region, what must not, and that nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import fuseline
from fuseline import Pipeline, Program, UserError
from fuseline.compiler.observe import Statistics
from fuseline.compiler.outline import inline
from tests.helpers.models import Mlp, ops, tiny_llama, traced
from tests.strategies import networks

FUSE = Pipeline("fuse{allow_empty}")


def regions(program: Program) -> list[list[str]]:
    """The ops of each region, in the order of the calls."""
    found = []
    for node in program.graph.nodes:
        if node.op == "call_module":
            inner = program.module.get_submodule(node.target)
            calls = [n.target for n in inner.graph.nodes if n.op == "call_function"]
            found.append([target._opname for target in calls if hasattr(target, "_opname")])
    return found


def fused(function, *args: torch.Tensor) -> Program:
    return FUSE.run(traced(function, *args), verification="full")[0]


class Raised(torch.nn.Module):
    """Norm, gate and up, gated unit, down, residual: as the graph stands once its parts have been recognised."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = self.inner
        h = torch.ops.fuseline.rms_norm(x, m.norm, 1e-6)
        y = torch.ops.fuseline.glu(F.linear(h, m.gate.weight), F.linear(h, m.up.weight), "silu")
        return x + m.down(y)


def test_before_and_after() -> None:
    model, x = Raised(), torch.randn(3, 8)
    seen = Statistics()
    after, report = Pipeline("fuse").run(fuseline.capture(model, (x,)), [seen], "full")
    assert ops(after) == ["linear_0", "linear_1"]
    assert regions(after) == [["rms_norm", "linear", "linear", "glu"], ["linear", "add"]]
    assert report["fuse"].rules == {"rms_norm + linear x2 + glu": 1, "linear + add": 1}
    assert torch.equal(after.to_module()(x), model(x))


def test_a_region_runs_as_its_own_naive_twin() -> None:
    after, _ = Pipeline("fuse").run(fuseline.capture(Raised(), (torch.randn(3, 8),)))
    call = next(n for n in after.graph.nodes if n.op == "call_module")
    region = after.module.get_submodule(call.target)
    inputs = [torch.randn(p.meta["val"].shape) for p in region.graph.nodes if p.op == "placeholder"]
    assert region(*inputs).shape == call.meta["val"].shape
    assert [p.meta.get("is_weight", False) for p in region.graph.nodes if p.op == "placeholder"].count(True) == 3
    assert torch.equal(inline(after.lift()[0])(*_flat(after))[0], after.run(after.examples)[0])


def _flat(program: Program) -> list[torch.Tensor]:
    _, expressions = program.lift()
    return [program.examples[i] for i in program.arguments] + program.binder(expressions)(program.examples)


def test_a_shared_norm_is_not_computed_twice() -> None:
    def function(x, w, a, b):
        h = torch.ops.fuseline.rms_norm(x, w, 1e-6)
        return F.linear(h, a), h * 2

    after = fused(function, torch.randn(3, 8), torch.randn(8), torch.randn(4, 8), torch.randn(4, 8))
    assert sum(r.count("rms_norm") for r in regions(after)) == 1
    assert not any("linear" in r and "rms_norm" in r for r in regions(after))


def test_a_result_that_is_also_used_elsewhere_ends_the_epilogue() -> None:
    def function(x, a):
        y = F.linear(x, a)
        return torch.tanh(y), y

    after = fused(function, torch.randn(3, 8), torch.randn(4, 8))
    assert regions(after) == [["linear"]] and ops(after) == ["linear_0", "tanh"]


def test_linears_of_one_input_go_together_by_format() -> None:
    class Three(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(8, n) for n in (8, 4, 4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.q(x), self.k(x), self.v(x)

    model, x = Three(), torch.randn(2, 8)
    program = fuseline.capture(model, (x,))
    assert regions(Pipeline("fuse").run(program)[0]) == [["linear"] * 3]
    mixed, _ = Pipeline("quantize{weights=int8,only=k},fuse").run(program, verification="full")
    assert sorted(map(tuple, regions(mixed))) == [("dequantize", "linear"), ("linear", "linear")]


def test_linears_that_need_each_other_stay_apart() -> None:
    def function(x, w):
        h = F.linear(x, w)
        return F.linear(x, torch.tanh(h.t() @ h))

    x, w = torch.randn(4, 4), torch.randn(4, 4)
    after = fused(function, x, w)
    assert [r.count("linear") for r in regions(after)] == [1, 1]
    assert torch.equal(after.to_module()(x, w), function(x, w))


def test_clusters_that_need_each_other_stay_apart() -> None:
    def function(x, y):
        a, b = torch.neg(x), torch.neg(y)
        c, d = torch.exp(a), torch.exp(b)
        return b + c, a + d, c, d

    x, y = torch.randn(3), torch.randn(3)
    after = fused(function, x, y)
    assert all(map(torch.equal, after.to_module()(x, y), function(x, y)))


def test_nothing_crosses_a_write_to_a_cache() -> None:
    def function(x, cache, row):
        before = torch.tanh(cache) * 2 + 1  # as it was
        cache.index_copy_(0, row, torch.exp(x) * 3)
        return torch.tanh(cache) * 2 - before  # as it is now: the same op on the same input, another value

    x, cache, row = torch.randn(1, 4), torch.randn(3, 4), torch.tensor([1])
    after = fused(function, x, cache.clone(), row)
    assert "index_copy_" in ops(after)  # the write stays outside
    assert all("index_copy_" not in r for r in regions(after))
    ours, theirs = cache.clone(), cache.clone()
    assert torch.equal(after.to_module()(x, ours, row), function(x, theirs, row))
    assert torch.equal(ours, theirs)


def test_a_naive_cluster_over_the_write_would_be_wrong() -> None:
    """Why reads of a written storage stay outside: moved behind the write they give something else."""
    x, cache, row = torch.randn(1, 4), torch.randn(3, 4), torch.tensor([1])
    before = torch.tanh(cache)
    assert not torch.equal(torch.tanh(cache.clone().index_copy_(0, row, x)), before)


def test_an_attention_over_a_cache_keeps_its_place_among_the_writes() -> None:
    def function(q, key, cache, row):
        before = torch.ops.fuseline.attention(q, cache, cache, None, 0.5, "full")
        cache.index_copy_(2, row, key)
        after = torch.ops.fuseline.attention(q, cache, cache, None, 0.5, "full")
        cache.index_copy_(2, row, key * 2)
        return before, after, torch.ops.fuseline.attention(q, cache, cache, None, 0.5, "full")

    q, key, cache, row = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8), torch.tensor([3])
    after = fused(function, q, key, cache.clone(), row)
    assert regions(after) == [["attention"]] * 3
    ours, theirs = cache.clone(), cache.clone()
    assert all(map(torch.equal, after.to_module()(q, key, ours, row), function(q, key, theirs, row)))
    assert torch.equal(ours, theirs)


def test_row_operations_join_over_the_same_rows_only() -> None:
    def function(x):
        y = torch.softmax(x * 2, -1)
        return y + y.mean(-1, keepdim=True), torch.softmax(x, 0) * 3

    x = torch.randn(4, 5)
    after = fused(function, x)
    assert ["mul", "softmax", "mean", "add"] in regions(after)
    assert all(not ({"softmax", "mul"} <= set(r) and len(r) == 2) for r in regions(after))  # softmax over rows is apart
    assert all(map(torch.equal, after.to_module()(x), function(x)))


def test_a_lone_pointwise_op_is_left_to_pytorch() -> None:
    after, _ = FUSE.run(traced(lambda x: torch.exp(x).t(), torch.randn(3, 3)))
    assert regions(after) == []
    with pytest.raises(UserError, match="no linear, no attention, no routed experts, and no two pointwise operations"):
        Pipeline("fuse").run(traced(lambda x: torch.exp(x), torch.randn(3, 3)))


def test_what_nothing_reads_is_no_region() -> None:
    class Unread(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            F.scaled_dot_product_attention(q, q, q)  # may draw random numbers, so the capture keeps it
            return torch.tanh(q) * 2.0

    q = torch.randn(1, 2, 3, 4)
    after, report = Pipeline("raise,fuse").run(fuseline.capture(Unread(), (q,)), verification="full")
    assert regions(after) == [["tanh", "mul"]] and report["raise"].rules == {"Attention": 1}
    assert torch.equal(after.to_module()(q), Unread()(q))


def test_options_choose_what_is_fused() -> None:
    def function(x, w):
        return F.linear(torch.exp(torch.neg(x)), w)

    program = traced(function, torch.randn(3, 4), torch.randn(4, 4))
    assert regions(Pipeline("fuse{linears=false}").run(program)[0]) == [["neg", "exp"]]
    assert regions(Pipeline("fuse{pointwise=false}").run(program)[0]) == [["linear"]]
    q = torch.randn(1, 2, 3, 4)
    program = traced(lambda q: torch.ops.fuseline.attention(q, q, q, None, 0.5, "full"), q)
    assert regions(Pipeline("fuse").run(program)[0]) == [["attention"]]
    assert regions(Pipeline("fuse{attention=false,allow_empty}").run(program)[0]) == []


def check_unchanged(network: torch.nn.Module) -> None:
    torch.manual_seed(1)
    x, cache = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    program = traced(network, x, cache.clone())
    after, _ = FUSE.run(program, verification="full")
    ours, theirs = cache.clone(), cache.clone()
    with torch.no_grad():
        actual, expected = after.to_module()(x, ours), network(x, theirs)
    assert all(map(torch.equal, actual, expected)) and torch.equal(ours, theirs)
    assert after.mutated == program.mutated
    # Fusing what is fused finds only what is left, and changes nothing either.
    again, _ = FUSE.run(after)
    assert all(map(torch.equal, again.to_module()(x, cache.clone()), expected))


@settings(max_examples=20)
@given(networks())
def test_random_networks_are_unchanged(network: torch.nn.Module) -> None:
    check_unchanged(network)


@pytest.mark.slow
@settings(max_examples=60)
@given(networks())
def test_more_random_networks_are_unchanged(network: torch.nn.Module) -> None:
    check_unchanged(network)


@settings(max_examples=25)
@given(networks())
def test_random_networks_train_alike(network: torch.nn.Module) -> None:
    x, cache = torch.randn(6, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    if any(step[0] in ("write", "read") for step in network.steps):
        return  # eager itself refuses some writes under autograd
    program = Program.from_fx(torch.fx.symbolic_trace(network), (x, cache))
    after, _ = FUSE.run(program)
    used = list(network.parameters())
    found = torch.autograd.grad(sum(o.sum() for o in after.to_module()(x, cache)), used, allow_unused=True) if (
        any(o.requires_grad for o in network(x, cache))
    ) else []  # fmt: skip
    expected = torch.autograd.grad(sum(o.sum() for o in network(x, cache)), used, allow_unused=True) if found else []
    for actual, reference in zip(found, expected, strict=True):
        assert (actual is None) == (reference is None) and (actual is None or torch.allclose(actual, reference))


def test_symbolic_sizes_stay_symbolic() -> None:
    torch.compiler.reset()
    model = fuseline.optimize(Raised(), "fuse")
    twin = copy.deepcopy(model)
    x = torch.randn(5, 8)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        model(x)
        for rows in (3, 17):
            y = torch.randn(rows, 8)
            assert torch.equal(model(y), twin(y))
    assert len(fuseline.reports(model)) == 1


def test_two_symbols_of_equal_value_stay_two() -> None:
    torch.compiler.reset()

    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.softmax(F.silu(x * 2), -1), F.silu(y * 2) * 3 + torch.exp(x).sum(0)

    model = fuseline.optimize(Two(), "fuse")
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    for tensor in (x, y):
        torch._dynamo.mark_dynamic(tensor, 0)  # an error if fusing compared the two sizes
    with torch.no_grad():
        model(x, y)
        model(torch.randn(6, 4), torch.randn(9, 4))
    assert len(fuseline.reports(model)) == 1


def test_a_whole_decoder() -> None:
    model, ids = tiny_llama(), torch.tensor([[1, 2, 3, 4]])
    program = fuseline.capture(model, (ids,), {"use_cache": False})
    after, report = Pipeline("fuse").run(program, verification="full")
    linears = [name for name in ops(program) if name == "linear"]
    assert sum(r.count("linear") for r in regions(after)) == len(linears)
    assert "linear" not in ops(after)
    with torch.no_grad():
        assert torch.equal(after.to_module()(ids, use_cache=False).logits, model(ids).logits)


def test_sparse_siblings_share_a_region_and_other_masks_do_not() -> None:
    sparse = torch.ops.fuseline.sparse_linear

    def block(x, norm, gate, up, down, t, u):
        h = torch.ops.fuseline.rms_norm(x, norm, 1e-6)
        y = torch.ops.fuseline.glu(sparse(h, gate, t), sparse(h, up, t), "silu")
        return x + sparse(y, down, u), sparse(h, gate, u)

    normal = torch.randn
    given = (normal(3, 8), normal(8), normal(8, 16), normal(8, 16), normal(16, 8), normal(1).abs(), normal(1).abs())
    assert sorted(regions(fused(block, *given))) == [
        ["rms_norm"],
        ["sparse_linear"],
        ["sparse_linear", "add"],
        ["sparse_linear", "sparse_linear", "glu"],
    ]
