"""Checks: each kind of fault is found as what it is, and a sound pipeline is not accused."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch

import fuseline
from fuseline import Pass, Pipeline, Program, UserError
from fuseline.compiler.debug.check import KINDS, Check, results
from fuseline.compiler.debug.sizes import at_size, other_sizes
from tests.helpers.models import Mlp

aten = torch.ops.aten


@pytest.fixture
def mlp() -> Program:
    torch.manual_seed(0)
    return fuseline.capture(Mlp(), (torch.randn(4, 8),), dynamic={"x": {0: torch.export.Dim.AUTO}})


@dataclass(frozen=True)
class Faulty(Pass):
    """Rewrites silu, wrongly."""

    name = "faulty"
    how: str = "scale"

    def run(self, program, rewriter):
        node = next(n for n in program.graph.nodes if n.target is aten.silu.default)
        if self.how == "crash":
            raise ValueError(f"no such node: silu_{id(self)}")
        if self.how == "hang":
            program.fake_mode.in_kernel_invocation = True  # where an alarm may find it
            time.sleep(60)
        if self.how == "unfinished":
            del node.meta["val"]
            rewriter.rewrite(node.next, [node.next], lambda new: new(node.next.target, *node.next.args), "copy")
            return

        def build(new):
            silu = new(aten.silu.default, node.args[0])
            if self.how == "size":  # right for four rows alone
                rows = new(aten.sym_size.int, silu, 0)
                return new(aten.mul.Tensor, silu, new(torch.ops.aten.div.Tensor, new(aten.full.default, [], 4.0), rows))
            return new(aten.mul.Tensor, silu, {"scale": 1.01, "nothing": 1, "nan": float("nan")}[self.how])

        rewriter.rewrite(node, [node], build, self.how)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("nothing", None, ""),
        ("scale", "error", "result 0 is off by"),
        ("nan", "error", "result 0 is off by inf"),
        ("size", "error", "=3"),
        ("crash", "crash", "no such node"),
        ("unfinished", "verify", "has no meta"),
        ("hang", "hang", "not done after 0.5 s"),
    ],
)
def test_a_fault_is_found_as_what_it_is(mlp: Program, how: str, kind: str | None, message: str) -> None:
    check = Check.parse("any|hang:0.5" if how == "hang" else "any")
    verdict = check(mlp, Pipeline([Faulty(how=how)]))
    assert verdict.kind == kind and message in str(verdict) and bool(verdict) == (kind is not None)


def test_a_program_is_whole_after_a_hang(mlp: Program) -> None:
    """The alarm may ring within a fake kernel, whose mode would go on as if it were there."""
    assert Check.parse("hang:0.5")(mlp, Pipeline([Faulty(how="hang")]))
    assert not Check.parse("any")(mlp, Pipeline("fuse"))


def test_what_was_not_asked_for_is_nothing(mlp: Program) -> None:
    assert not Check.parse("error")(mlp, Pipeline([Faulty(how="crash")]))
    assert not Check.parse("crash:other")(mlp, Pipeline([Faulty(how="crash")]))
    assert not Check.parse("error:0.5")(mlp, Pipeline([Faulty(how="scale")]))


def test_sound_pipelines_are_not_accused(mlp: Program) -> None:
    check = Check.parse("any")
    assert not check(mlp, Pipeline("fuse")) and not check(mlp, Pipeline([]))
    assert check(mlp, Pipeline("quantize{weights=int8}")).kind == "error"  # it approximates, and says so
    assert not Check.parse("error:0.1")(mlp, Pipeline("quantize{weights=int8}"))


def test_signatures_forget_numbers(mlp: Program) -> None:
    check = Check.parse("crash")
    first, second = (check(mlp, Pipeline([Faulty(how="crash", allow_empty=flag)])) for flag in (False, True))
    assert first.signature == second.signature and "silu_N" in first.signature


class Cache(torch.nn.Module):
    def forward(self, cache: torch.Tensor, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, at, x)
        return x * 2


def test_a_lost_write_is_found() -> None:
    program = fuseline.capture(Cache(), (torch.zeros(5, 3), torch.ones(1, 3), torch.tensor([2])))
    assert len(results(program, program.examples)) == 2
    broken = program.copy()
    write = next(n for n in broken.graph.nodes if n.target is aten.index_copy_.default)
    broken.graph.erase_node(write)
    broken.module.recompile()
    check = Check.parse("error")
    assert not check.compare(program, program.copy())
    verdict = check.compare(program, broken)
    assert verdict.kind == "error" and "result 1" in verdict.message


def test_other_sizes_come_from_the_captured_values(mlp: Program) -> None:
    sizes = list(other_sizes(mlp))
    assert [s.partition("=")[2] for s in sizes] == ["3", "17", "33"]
    flat = at_size(mlp, sizes[1])
    assert flat[-1].shape == (17, 8) and torch.equal(flat[-1][4], mlp.examples[-1][0])


@pytest.mark.parametrize("text", ["any", "crash", "crash:a.c", "error:0.001", "error|verify", "hang:2.0"])
def test_checks_print_as_they_parse(text: str) -> None:
    assert str(Check.parse(text)) == text and Check.parse(str(Check.parse(text))) == Check.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eror", "unknown check 'eror'; did you mean 'error'"),
        ("error:much", "'much' is no number: error:much"),
        ("crash:(", "is no pattern"),
    ],
)
def test_other_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        Check.parse(text)
    assert set(KINDS) == {"crash", "verify", "error", "hang"}
