"""What no region takes is gathered into regions that Inductor may compile; the program computes what it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import fuseline
from fuseline.codegen import leftovers
from fuseline.codegen.leftovers import gather, identity
from fuseline.codegen.lower import lower
from fuseline.compiler.program import Program


class Block(nn.Module):
    """Convolution → batch norm → relu → convolution → batch norm → add → relu, as in a residual network."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm, self.norm2 = (nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(self.norm2(self.second(y)) + x)


def captured(model: nn.Module, *inputs: torch.Tensor, passes: str = "fuse{allow_empty}") -> Program:
    after, _ = fuseline.Pipeline(passes).run(fuseline.capture(model.eval(), inputs))
    module, _ = after.lift()
    return replace(after, module=module)


def function(code) -> nn.Module:
    class Function(nn.Module):
        def forward(self, *inputs):
            return code(*inputs)

    return Function()


def ops(program: Program, name: str) -> Counter[str]:
    graph = program.module.get_submodule(name).graph
    return Counter(str(n.target).removeprefix("aten.") for n in graph.nodes if n.op.startswith("call"))


def test_a_residual_block_is_one_region_with_the_pointwise_region_inside():
    program = captured(Block(), torch.randn(2, 4, 8, 8))
    before = [str(n.target) for n in program.graph.nodes if n.op == "call_module"]
    assert before == ["pointwise_0"]  # add → relu, of ours
    (name,) = gather(program)
    assert ops(program, name) == {"conv2d.default": 2, "batch_norm.default": 2, "relu.default": 1, "pointwise_0": 1}
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_module"] == [name]


def test_equal_regions_have_one_identity_and_other_shapes_another():
    block = nn.Sequential(Block(), nn.Linear(8, 8), nn.Linear(8, 8), Block())
    program = captured(block, torch.randn(2, 4, 8, 8))
    first, second = (program.module.get_submodule(name) for name in gather(program))
    assert identity(first) == identity(second) == first.meta["identity"]
    other = captured(Block(), torch.randn(3, 4, 8, 8))
    assert other.module.get_submodule(gather(other)[0]).meta["identity"] != identity(first)
    strided = captured(Block(), torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last))
    assert strided.module.get_submodule(gather(strided)[0]).meta["identity"] != identity(first)


def test_the_module_is_the_same_program_and_says_what_is_left_over():
    result = lower(replace(captured(Block(), torch.randn(2, 4, 8, 8))), leftovers=True)
    assert list(result.leftovers) == ["run_inductor_0"] and not result.refusals
    assert "# left over, for Inductor where that is faster" in result.source
    assert "pointwise_0 = run_pointwise_0(batch_norm_1, x)" in result.source
    assert "return run_inductor_0" not in result.source and "inductor_0 = run_inductor_0(" in result.source
    assert [k.name for k in result.kernels] == ["run_pointwise_0_kernel"]
    regions = {r["name"]: r for r in result.manifest()["regions"]}
    assert regions["pointwise_0"]["kernels"] and regions["inductor_0"]["kind"] == "inductor"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (lambda x: x.transpose(0, 1).reshape(-1).view(4, 4), "views alone"),
        (lambda x: torch.topk(x, 2)[0], "one kernel"),
        (lambda x: torch.bmm(torch.bmm(x[None], x[None]), x[None]), "calls of a library alone"),
        (lambda x: torch.nn.functional.dropout(torch.cumsum(x, 0), 0.5, training=True), "random numbers"),
        (lambda x: x[x > 0].cumsum(0), "a size that depends on data"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_is_not_worth_it_or_cannot_be_moved_stays(code, why):
    assert gather(captured(function(code), torch.randn(4, 4))) == []


def test_writes_to_a_cache_and_what_reads_it_stay_where_they_are():
    def step(cache, x):
        cache.index_copy_(0, torch.tensor([1]), x.cumsum(1)[None])
        return cache.cumsum(0).flip(0)

    program = captured(function(step), torch.zeros(3, 4, 4), torch.randn(4, 4))
    assert program.mutated
    for name in gather(program):
        assert not {"index_copy_.default", "index_copy.default"} & set(ops(program, name))
        assert all("cache" not in n.name for n in program.module.get_submodule(name).graph.nodes)


def test_a_norm_that_moves_its_statistics_stays():
    def forward(x, mean, var):
        return torch.cumsum(torch.nn.functional.batch_norm(x, mean, var, training=True), 0)

    program = captured(function(forward), torch.randn(4, 3), torch.zeros(3), torch.ones(3))
    assert all("batch_norm.default" not in ops(program, name) for name in gather(program))


def test_the_most_kernels_are_taken_where_there_are_too_many_regions(monkeypatch):
    monkeypatch.setattr(leftovers, "DISTINCT", 1)

    def forward(x, w):
        small = torch.nn.functional.linear(x.cumsum(1).flip(0), w)
        return torch.nn.functional.linear(small, w).cumsum(1).flip(0).cumsum(0).flip(1)

    program = captured(function(forward), torch.randn(4, 4), torch.randn(4, 4))
    (name,) = gather(program)
    assert sum(ops(program, name).values()) == 4


STEPS = {
    "cumsum": lambda a, b: a.cumsum(0),
    "flip": lambda a, b: a.flip(1),
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "relu": lambda a, b: torch.relu(a),
    "matmul": lambda a, b: torch.matmul(a, b),
    "linear": lambda a, b: torch.nn.functional.linear(a, b),
    "transpose": lambda a, b: a.transpose(0, 1),
    "top": lambda a, b: torch.topk(a, 4, dim=1)[0],
    "max": lambda a, b: torch.max(a, 1, keepdim=True)[0] - b,
    "softmax": lambda a, b: torch.softmax(a, -1),
    "write": lambda a, b: a.add(1).mul_(b),
}


def check_computes(steps, results):
    def forward(x, y):
        values = [x, y]
        for name, i, j in steps:
            values.append(STEPS[name](values[i % len(values)], values[j % len(values)]))
        return (values[-1], *(values[i % len(values)].clone() for i in results))

    x, y = torch.randn(4, 4), torch.randn(4, 4)
    program = captured(function(forward), x, y)
    expected = program.module(x, y)
    names = gather(program)
    program.graph.lint()
    for a, b in zip(expected, program.module(x, y), strict=True):
        assert torch.equal(a, b) or (a.isnan() == b.isnan()).all()
    for name in names:
        outputs = program.module.get_submodule(name).graph.find_nodes(op="output")[0].args[0]
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        assert all(isinstance(n.meta["val"], torch.Tensor) for n in outputs)


programs = given(
    st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=14
    ),
    st.sets(st.integers(0, 30), max_size=3),
)


@settings(max_examples=20, deadline=None)
@programs
def test_any_program_computes_what_it_did(steps, results):
    check_computes(steps, results)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@programs
def test_more_programs_compute_what_they_did(steps, results):
    check_computes(steps, results)
