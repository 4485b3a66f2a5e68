"""Compare, of stages edited by hand: the node that was broken is named; another way to write the same thing is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import Pipeline, Program, UserError
from fuseline.compiler.debug.comparison import Comparison
from fuseline.compiler.debug.edits import compare_programs
from fuseline.compiler.observe import Dump
from fuseline.compiler.stage import load_stage
from tests.helpers.models import Mlp, tiny_llama, traced

OPS = "torch.ops.aten"
WEIGHT = "model_layers_0_post_attention_layernorm_weight"


class Dumped:
    """A program, its dumped stages, and edits of the first one."""

    def __init__(self, program: Program, folder: Path):
        self.program, self.folder = program, folder
        Pipeline("raise,fuse").run(program, [Dump(folder)])
        self.path = folder / "000_captured.py"
        self.text = self.path.read_text()
        self.original = load_stage(self.path)
        roots = [n for n in self.original.graph.nodes if n.target is torch.ops.aten.rsqrt.default]
        self.norms = [(n.args[0].args[0].args[0], n.args[0].args[0], n.args[0], n, next(iter(n.users))) for n in roots]

    def edited(self, *edits: tuple[str, str]) -> Program:
        """The stage with patterns replaced, each of which occurs exactly once."""
        text = self.text
        for pattern, replacement in edits:
            text, count = re.subn(pattern, replacement, text)
            assert count == 1, f"{pattern} occurs {count} times"
        path = self.folder / "009_edited.py"
        path.write_text(text)
        return load_stage(path)

    def compare(self, *edits: tuple[str, str]) -> Comparison:
        return compare_programs(self.original, self.edited(*edits))


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Dumped:
    ids = torch.randint(0, 100, (1, 16), generator=torch.Generator().manual_seed(0))
    program = fuseline.capture(tiny_llama(), (ids,), {"use_cache": False})
    return Dumped(program, tmp_path_factory.mktemp("dump"))


def break_norm(nodes: tuple[torch.fx.Node, ...], how: str) -> tuple[str, str, str]:
    """(the node that is broken, a pattern, what to put there)."""
    square, mean, eps, root, scaled = (n.name for n in nodes)
    epsilon = nodes[2].args[1]
    return {
        "power": (square, rf"({square} = .*), 2\)", r"\1, 3)"),
        "mean": (mean, rf"({mean} = .*)\[-1\], True", r"\1[-2], True"),
        "sum": (mean, rf"({mean} = {OPS})\.mean\.dim", r"\1.sum.dim_IntList"),
        "eps": (eps, rf"({eps} = .*), {epsilon}\)", r"\1, 0.01)"),
        "tiny": (eps, rf"({eps} = .*), {epsilon}\)", rf"\1, {epsilon * 1.01})"),
        "root": (root, rf"({root} = {OPS})\.rsqrt", r"\1.sqrt"),
        "product": (scaled, rf"({scaled} = {OPS})\.mul", r"\1.add"),
    }[how]


BREAKS = ("power", "mean", "sum", "eps", "tiny", "root", "product")
EACH = [(norm, how) for norm in range(5) for how in BREAKS]


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("norm", "how"), EACH)
def test_a_broken_norm_is_named(dumped: Dumped, norm: int, how: str) -> None:
    assert len(dumped.norms) == 5
    node, pattern, replacement = break_norm(dumped.norms[norm], how)
    found = dumped.compare((pattern, replacement))
    assert found.first is not None and found.first.node == node
    assert found.first.rewrite.details[0] != found.first.rewrite.details[1]
    assert not found.ok and len(found.faults) == 1


@pytest.mark.parametrize(
    "edits",
    [
        (),
        ((rf"(add_6 = {OPS}\.add\.Tensor)\((\w+), (\w+)\)", r"\1(\3, \2)"),),
        ((rf"(pow_2 = {OPS})\.pow\.Tensor_Scalar\((\w+), 2\)", r"\1.mul.Tensor(\2, \2)"),),
        ((rf"(rsqrt_1 = {OPS})\.rsqrt\.default\((\w+)\)", rf"\1.reciprocal.default({OPS}.sqrt.default(\2))"),),
        ((rf"(rsqrt_1 = {OPS})\.rsqrt\.default\((\w+)\)", r"\1.pow.Tensor_Scalar(\2, -0.5)"),),
        # x + (a + b) for (x + a) + b, and w·(x·r) with its products in another order: nodes in between are others.
        ((rf"(add_12 = {OPS}\.add\.Tensor)\(add_8, (\w+)\)", rf"\1(add_6, {OPS}.add.Tensor(linear_6, \2))"),),
        (
            (rf"(mul_8 = {OPS}\.mul\.Tensor)\((\w+), rsqrt_1\)", rf"\1(\2, {WEIGHT})"),
            (rf"(mul_9 = {OPS}\.mul\.Tensor)\(\w+, mul_8\)", r"\1(rsqrt_1, mul_8)"),
        ),
    ],
    ids=["nothing", "commuted", "square", "quotient", "power", "regrouped sum", "regrouped product"],
)  # fmt: skip
def test_another_way_to_write_the_same_is_not_reported(dumped: Dumped, edits: tuple[tuple[str, str], ...]) -> None:
    found = dumped.compare(*edits)
    assert found.ok and not found.faults
    assert len(found.rewrites) >= bool(edits)
    assert all(r.verdict in ("rounding", "regrouped") for r in found.rewrites)


def test_two_broken_nodes_are_both_named_the_first_one_first(dumped: Dumped) -> None:
    later, earlier = (break_norm(dumped.norms[i], "eps") for i in (4, 1))
    found = dumped.compare(later[1:], earlier[1:])
    assert [f.node for f in found.faults] == [earlier[0], later[0]]


def test_a_weight_that_was_exchanged_is_named(dumped: Dumped) -> None:
    found = dumped.compare(
        (r"'model\.layers\.0\.self_attn\.k_proj\.weight'(,|\})(?! *\{)", r"'model.layers.0.self_attn.v_proj.weight'\1")
    )
    assert found.first is not None and found.first.rewrite.rule == "weight"
    assert "k_proj" in found.first.node


def test_a_result_that_was_exchanged_is_named(dumped: Dumped) -> None:
    found = dumped.compare((r"return \(linear_14,\)|return \[linear_14\]", "return (linear_7,)"))
    assert not found.ok and found.first is not None and found.first.rewrite.rule == "result"


def test_a_model_and_an_edited_stage_of_it(dumped: Dumped) -> None:
    node, *edit = break_norm(dumped.norms[2], "power")
    found = compare_programs(dumped.program, dumped.edited(tuple(edit)))
    assert found.first is not None and found.first.node == node


def test_stages_with_other_names_are_paired_by_structure(dumped: Dumped) -> None:
    fused = load_stage(dumped.folder / "002_fuse.py")
    found = compare_programs(dumped.original, fused)
    assert found.ok and found.rewrites and len(found.nodes) > 50
    text = (dumped.folder / "002_fuse.py").read_text()
    edited, count = re.subn(
        r"(rms_norm\.default\(\w+, model_layers_1_input_layernorm_weight), 1e-0\d", r"\1, 0.3", text
    )
    assert count == 1
    (dumped.folder / "008_edited.py").write_text(edited)
    wrong = compare_programs(dumped.original, load_stage(dumped.folder / "008_edited.py"))
    assert wrong.first is not None and "rms_norm" in wrong.first.node


def test_programs_that_take_or_return_something_else_are_refused() -> None:
    torch.manual_seed(0)
    mlp = fuseline.capture(Mlp(), (torch.randn(4, 8),))
    two = traced(lambda x, y: x + y, torch.randn(8), torch.randn(8))
    with pytest.raises(UserError, match="the programs have 1 and 2 inputs: they cannot be compared node by node"):
        compare_programs(mlp, two)
    pair = traced(lambda x: (x, x + 1.0), torch.randn(4, 8))
    with pytest.raises(UserError, match="1 and 2 results"):
        compare_programs(mlp, pair)


@pytest.mark.slow
def test_one_of_the_61_norms_of_smollm2_is_broken_by_hand(tmp_path: Path) -> None:
    from fuseline.cli.graphs import load_program

    dumped = Dumped(load_program("demo:smollm2"), tmp_path)
    assert len(dumped.norms) == 61
    for norm, how in ((36, "power"), (0, "tiny"), (60, "mean"), (17, "eps")):
        node, pattern, replacement = break_norm(dumped.norms[norm], how)
        found = compare_programs(dumped.program, dumped.edited((pattern, replacement)))
        assert found.first is not None and found.first.node == node, (norm, how)
        assert [f.node for f in found.faults] == [node]
    assert dumped.compare(
        (rf"({dumped.norms[36][0]} = {OPS})\.pow\.Tensor_Scalar\((\w+), 2\)", r"\1.mul.Tensor(\2, \2)")
    ).ok
