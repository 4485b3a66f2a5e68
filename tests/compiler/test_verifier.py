"""The verifier: a broken program is an error with a window of the graph, the rule, the maker and the user's line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import fuseline
from fuseline import Pass, Pipeline, Program, UserError
from fuseline.compiler.errors import VerificationError
from fuseline.compiler.expressions import Param
from fuseline.compiler.verifier import LEVELS, verify
from tests.helpers.models import Mlp

aten = torch.ops.aten


def broken(damage: Callable[[Program], None]) -> Pass:
    """A pass that does one honest rewrite and then damages the program behind the rewriter's back."""

    @dataclass(frozen=True)
    class Damage(Pass):
        name = "damage"

        def run(self, program, rewriter):
            silu = next(n for n in program.graph.nodes if n.target is aten.silu.default)
            rewriter.rewrite(silu, [silu], lambda new: new(aten.silu.default, silu.args[0]), "again")
            damage(program)

    return Damage()


def error_of(damage: Callable[[Program], None], level: str = "quick") -> str:
    program = fuseline.capture(Mlp(), (torch.randn(2, 8),))
    with pytest.raises(VerificationError) as caught:
        Pipeline([broken(damage)]).run(program, verification=level)
    text = str(caught.value)
    assert text.startswith("after pass 'damage': ")
    assert "rule: " in text and "models.py:" in text
    window = [line for line in text.splitlines() if line.startswith(("  > ", "    %"))]
    assert sum(line.startswith("  > ") for line in window) == 1 and 4 <= len(window) <= 7
    return text


def first(program: Program, target) -> torch.fx.Node:
    return next(n for n in program.graph.nodes if n.target is target)


def test_a_missing_value() -> None:
    text = error_of(lambda p: first(p, aten.silu.default).meta.pop("val"))
    assert "'silu_default' has no meta['val']" in text or "has no meta['val']" in text
    assert "made by: damage/again" in text


def test_a_use_before_the_definition() -> None:
    def damage(program: Program) -> None:
        first(program, aten.silu.default).append(first(program, aten.rsqrt.default))

    assert "uses 'rsqrt' before it is defined, or after it was erased" in error_of(damage)


def test_a_weight_that_the_program_does_not_have() -> None:
    def damage(program: Program) -> None:
        program.weights()[0].meta["weight"] = Param("lost.weight")

    assert "refers to the parameter 'lost.weight', which the program does not have" in error_of(damage)


def test_a_tensor_without_an_expression() -> None:
    assert "is a tensor without a weight expression" in error_of(lambda p: p.weights()[0].meta.pop("weight"))


def test_a_method_call() -> None:
    def damage(program: Program) -> None:
        node = first(program, aten.silu.default)
        with program.graph.inserting_after(node):
            method = program.graph.call_method("relu", (node,))
        method.meta = dict(node.meta)
        node.replace_all_uses_with(method, delete_user_cb=lambda user: user is not method)

    assert "is a method call 'relu', which normal form does not have" in error_of(damage)


def test_a_submodule_that_does_not_exist() -> None:
    def damage(program: Program) -> None:
        node = first(program, aten.silu.default)
        node.op, node.target = "call_module", "nowhere"

    assert "calls the submodule 'nowhere', which does not exist" in error_of(damage)


def wrong_type(program: Program) -> None:
    node = first(program, aten.silu.default)
    node.meta["val"] = node.meta["val"].to(torch.float16)


def test_full_propagation_finds_a_wrong_value() -> None:
    text = error_of(wrong_type, "full")
    assert "is recorded as float16[2, 16] and computes float32[2, 16]" in text
    program = fuseline.capture(Mlp(), (torch.randn(2, 8),))
    Pipeline([broken(wrong_type)]).run(program, verification="quick")  # the cheap rules cannot see it


def test_full_propagation_finds_arguments_that_cannot_run() -> None:
    def damage(program: Program) -> None:
        down = [n for n in program.graph.nodes if n.target is aten.linear.default][-1]
        down.args = (down.args[0], first(program, aten.linear.default).args[1], None)

    assert "cannot run on values of the recorded types: " in error_of(damage, "full")


def test_off_means_off() -> None:
    program = fuseline.capture(Mlp(), (torch.randn(2, 8),))
    Pipeline([broken(lambda p: first(p, aten.silu.default).meta.pop("val"))]).run(program, verification="off")


def test_an_unknown_level_names_the_valid_ones() -> None:
    program = fuseline.capture(Mlp(), (torch.randn(2, 8),))
    with pytest.raises(UserError, match="unknown verification level 'ful'; did you mean 'full'") as caught:
        Pipeline("fuse").run(program, verification="ful")
    assert all(level in str(caught.value) for level in LEVELS)


def test_the_time_of_the_checks_is_kept_apart() -> None:
    _, report = Pipeline("fuse").run(fuseline.capture(Mlp(), (torch.randn(2, 8),)), verification="full")
    assert report["fuse"].verify_ms > 0 and report["fuse"].ms > 0


def test_a_captured_program_passes_every_rule() -> None:
    verify(fuseline.capture(Mlp(), (torch.randn(2, 8),)), "full")
