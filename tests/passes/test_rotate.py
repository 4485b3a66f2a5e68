"""rotate: exact on every architecture and rewrite by rewrite; folded where that is right, refused elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import fuseline
import tests.strategies  # noqa: F401  the profile of the project's fuzz tests
from fuseline import Pipeline, Program
from fuseline.compiler import ops
from fuseline.compiler.errors import PassError
from fuseline.compiler.expressions import Param
from fuseline.compiler.observe import Limit
from fuseline.compiler.precision import error, floats, run_promoted
from fuseline.compiler.report import Report
from tests.passes.rotated_models import VOCABULARY, Decoder, Shape, shapes

IDS = torch.arange(10).reshape(2, 5) % VOCABULARY
EXACT = 1e-12


def program(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Program:
    return fuseline.capture(model, args or (IDS,), kwargs or None)


def rotated(before: Program, options: str) -> tuple[Program, Report]:
    return Pipeline(f"raise{{allow_empty}},rotate{{{options},allow_empty}}").run(before, verification="full")


def change(before: Program, after: Program) -> float:
    """The largest error of a result in float64, casts of the model's own promoted."""
    flat = before.examples
    pairs = zip(floats(run_promoted(after, flat)), floats(run_promoted(before, flat)), strict=True)
    return max(error(a, b) for a, b in pairs)


def online(after: Program) -> int:
    return sum(node.target is ops.hadamard.overload for node in after.graph.nodes)


def counts(report: Report, label: str) -> dict[str, int]:
    return {rule.removeprefix(f"{label} "): n for rule, n in report["rotate"].rules.items() if rule.startswith(label)}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("norm", ["rms", "unit", "layer"])
@pytest.mark.parametrize("fused", [False, True])
def test_what_folds_leaves_nothing_at_run_time(norm: str, fused: bool) -> None:
    shape = Shape(norm=norm, bias=True, groups=2, fused=fused, mlp="fused" if fused else "gated", scale=0.5)
    before = program(Decoder(shape))
    for options, left in (("r1", 0), ("r2", 0), ("r3", 4), ("r4", 2), ("r1,r2", 0), ("r1,r2,r3,r4", 6)):
        after, report = rotated(before, options)
        assert online(after) == left and not report["rotate"].refused, options
        assert change(before, after) < EXACT, options
        assert all(node.users for node in after.graph.nodes if node.op == "call_function"), (
            "nothing is computed in vain"
        )
    rows = counts(report, "R1")
    assert rows["into rows"] == 5  # the table, and what the blocks return
    assert counts(report, "R2")["into columns"] == counts(report, "R2")["into rows"] == 2


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("kind", "seed"), [("random-hadamard", 3), ("orthogonal", 4)])
def test_other_kinds_of_rotations(kind: str, seed: int) -> None:
    before = program(Decoder(Shape(bias=True, layers=1)))
    after, _ = rotated(before, f"r1,r2,r3,r4,kind={kind},seed={seed}")
    assert change(before, after) < EXACT
    other, _ = rotated(before, f"r1,r2,r3,r4,kind={kind},seed={seed + 1}")
    made = [{n.meta["weight"] for n in one.weights()} for one in (after, other)]
    assert made[0] != made[1]


def test_blocks_rotate_by_themselves() -> None:
    before = program(Decoder(Shape(width=20, inner=16)))
    after, _ = rotated(before, "r1,r4,block=4")
    assert change(before, after) < EXACT
    assert {n.args[2] for n in after.graph.nodes if n.target is ops.hadamard.overload} == {4}


def test_channels_that_are_no_number_of_blocks_are_refused() -> None:
    before = program(Decoder(Shape(width=12, inner=20)))
    after, report = rotated(before, "r1,r4,block=8")
    assert not report["rotate"].matched and {*report["rotate"].refused.values()} == {
        "R1: 12 channels are no number of blocks of 8", "R4: 20 channels are no number of blocks of 8",
    }  # fmt: skip


def test_tied_embeddings_stay_tied() -> None:
    before = program(Decoder(Shape(tied=True)))
    after, report = rotated(before, "r1")
    assert online(after) == 2 and change(before, after) < EXACT
    assert counts(report, "R1")["enters"] == 1 and counts(report, "R1")["into columns"] == 10
    (table,) = [n for n in after.weights() if n.meta["weight"] in (Param("embed.weight"), Param("head.weight"))]
    assert {u.target for u in table.users} == {torch.ops.aten.embedding.default, torch.ops.aten.linear.default}
    untied, _ = rotated(before, "r1,untie")
    assert online(untied) == 0 and change(before, untied) < EXACT


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_every_number_of_rewrites_is_exact(every: int) -> None:
    """So bisect can stop anywhere, and each fold stands on its own."""
    before = program(Decoder(Shape(layers=1, norm="layer", bias=True, fused=True)))
    raised, _ = Pipeline("raise").run(before)
    step = Pipeline("rotate{r1,r2,r3,r4}")
    _, report = step.run(raised)
    for rewrites in range(0, report["rotate"].matched + 1, every):
        after, _ = step.run(raised, [Limit(rewrites)], verification="full")
        assert change(before, after) < EXACT, rewrites
    for skipped in range(1, report["rotate"].matched + 1, 2 * every + 1):
        after, _ = step.run(raised, [Limit(skip=[skipped])], verification="full")
        assert change(before, after) < EXACT, skipped


def test_a_norm_whose_result_is_added_is_a_boundary() -> None:
    """Gemma 2's norms behind the blocks; and the numbers that say why."""
    before = program(Decoder(Shape(sandwich=True)))
    after, report = rotated(before, "r1,r2,r4")
    (reason,) = {r for r in report["rotate"].refused.values() if "would be left" in r}
    assert reason.startswith("R1: 4 operations would be left at run time, the first at ")
    assert counts(report, "R2") and counts(report, "R4") and not counts(report, "R1")
    assert change(before, after) < EXACT
    x, scale, rotation = (
        torch.randn(3, 8).double(),
        torch.rand(8).double(),
        torch.linalg.qr(torch.randn(8, 8).double())[0],
    )
    norm = lambda x, w: torch.nn.functional.rms_norm(x, (8,), w)
    assert error(norm(x @ rotation, scale), norm(x, scale) @ rotation) > 0.1
    assert error(norm(x @ rotation, None), norm(x, None) @ rotation) < EXACT


def test_a_gate_reads_single_channels() -> None:
    before = program(Decoder(Shape(gate=True)))
    after, report = rotated(before, "r2,r4")
    assert not counts(report, "R2") and online(after) == 2 + 2, "the gated result is what R4 takes before the product"
    assert all("reads single channels of what attention returns" in r for r in report["rotate"].refused.values())
    assert change(before, after) < EXACT


def test_a_stream_that_others_read_is_refused() -> None:
    class Hidden(Decoder):
        def forward(self, ids):
            x = self.embed(ids)
            seen = [x]
            for norms, mlp in zip(self.norms, self.mlps, strict=True):
                x = x + mlp(norms[0](x))
                seen.append(torch.tanh(x))
            return self.head(self.norm(x)), *seen

    before = program(Hidden(Shape(layers=3)))
    after, report = rotated(before, "r1")
    assert (
        not report["rotate"].matched
        and "operations would be left at run time" in [*report["rotate"].refused.values()][0]
    )
    with pytest.raises(fuseline.UserError, match="pass 'rotate' matched no site"):
        Pipeline("raise,rotate{r1}").run(before)


def test_layer_norms_of_what_is_normed_are_refused() -> None:
    class After(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mlp = torch.nn.Embedding(VOCABULARY, 12), torch.nn.Linear(12, 12)
            self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(12) for _ in range(3))

        def forward(self, ids):
            x = self.norms[0](self.embed(ids))
            for norm in self.norms[1:]:
                x = norm(x + self.mlp(x))
            return x

    before = program(After().double())
    after, report = rotated(before, "r1")
    assert not report["rotate"].matched and len(report["rotate"].refused) == 3
    assert any("reads it as well, mean and all" in r for r in report["rotate"].refused.values())


def test_a_norm_over_two_streams_takes_away_one_mean() -> None:
    """As where an image's patches are merged: each half is centred by itself nowhere else."""

    class Merged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first = torch.nn.Embedding(VOCABULARY, 8), torch.nn.LayerNorm(8)
            self.mlp, self.second, self.out = torch.nn.Linear(8, 8), torch.nn.LayerNorm(16), torch.nn.Linear(16, 3)

        def forward(self, ids):
            x = self.embed(ids)
            x = x + self.mlp(self.first(x))
            return self.out(self.second(torch.cat((x, x * 2.0), -1)))

    before = program(Merged().double())
    after, _ = rotated(before, "r1")
    assert change(before, after) < EXACT


def test_what_is_no_whole_product_is_centred_at_run_time() -> None:
    """Half of a product's channels, or a norm's result: their mean is no mean of the rows behind them."""

    class Parts(torch.nn.Module):
        def __init__(self, cut: bool):
            super().__init__()
            self.cut, self.embed, self.wide = cut, torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, 16)
            self.first, self.last, self.out = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)

        def forward(self, ids):
            x = self.embed(ids)
            h = self.wide(self.first(x))
            y = h[..., :8] if self.cut else torch.nn.functional.rms_norm(h[..., :8].exp(), (8,), None, 1e-5)
            return self.out(self.last(x + y)), torch.tanh(h[..., 8:])

    for cut in (True, False):
        before = program(Parts(cut).double())
        after, report = rotated(before, "r1")
        assert report["rotate"].rules["layer norm of a centred stream"] == 2
        assert change(before, after) < EXACT, cut


def test_weights_that_want_gradients_stay() -> None:
    model = fuseline.optimize(Decoder(Shape()), "raise,rotate{r2,r4,allow_empty}")
    model(IDS).sum().backward()
    report = fuseline.reports(model)[0].report["rotate"]
    assert not report.matched and all("gradient" in r or "folded" in r for r in report.refused.values())


def test_it_says_what_it_needs() -> None:
    with pytest.raises(fuseline.UserError, match="needs to be told what to rotate"):
        Pipeline("rotate")
    with pytest.raises(fuseline.UserError, match="kind"):
        Pipeline("rotate{r1,kind=hadamrad}")
    with pytest.raises(PassError, match="put 'raise' before it"):
        Pipeline("rotate{r1}").run(program(Decoder(Shape())))


def test_quantize_sees_rotated_weights() -> None:
    """An outlier planted in one channel of the MLP costs int4 dear, and R4 spreads it."""
    model = Decoder(Shape(width=16, heads=2, head=8, inner=64))
    with torch.no_grad():
        for mlp in model.mlps:
            mlp.up.weight[3] *= 200.0
            mlp.down.weight[:, 3] /= 200.0
    before = program(model)

    def loss(pipeline: str) -> float:
        after, _ = Pipeline(pipeline).run(before)
        return error(floats(after.run(before.examples))[0], floats(before.run(before.examples))[0])

    plain = loss("raise,quantize{activations=int8,only=*.down}")
    turned = loss("raise,rotate{r4},quantize{activations=int8,only=*.down}")
    assert turned < plain / 4, (plain, turned)


subsets = st.lists(st.sampled_from(("r1", "r2", "r3", "r4")), min_size=1, max_size=4, unique=True)
kinds = st.sampled_from(("hadamard", "random-hadamard", "orthogonal"))


def check(shape: Shape, rotations: list[str], kind: str, untie: bool = False) -> None:
    """Exact; and where norms that commute stand before the blocks, R1 and R2 really fold, throughout."""
    before = program(Decoder(shape))
    after, report = rotated(before, f"{','.join(rotations)},kind={kind}{',untie' if untie else ''}")
    assert change(before, after) < EXACT
    if not shape.pre_norm:
        return
    heads = 2 * shape.q_norm * shape.layers
    refused = [reason for reason in report["rotate"].refused.values() if reason[:2] in ("R1", "R2")]
    assert refused == ["R1: no product reads what this norm returns"] * (heads if "r1" in rotations else 0)
    if "r1" in rotations:
        tied = shape.tied and not untie
        writers = 1 + (2 + bool(shape.experts and shape.shared)) * shape.layers
        assert counts(report, "R1")["into rows"] == writers - tied
        assert counts(report, "R1").get("enters", 0) == tied
    if "r2" in rotations:
        assert counts(report, "R2")["into rows"] == counts(report, "R2")["into columns"] == shape.layers


@pytest.mark.slow
@settings(max_examples=14)
@given(shapes, subsets, kinds)
def test_random_transformers(shape: Shape, rotations: list[str], kind: str) -> None:
    check(shape, rotations, kind)


@pytest.mark.slow
@settings(max_examples=150)
@given(shapes, subsets, kinds, st.booleans())
def test_many_random_transformers(shape: Shape, rotations: list[str], kind: str, untie: bool) -> None:
    check(shape, rotations, kind, untie)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("options", ["r1,r2,r3,r4", "r1,r2,untie,kind=orthogonal"])
def test_a_mixture_with_everything(options: str) -> None:
    shape = Shape(experts=3, shared=True, fused=True, by_head=True, q_norm=True, bias=True, tied=True, groups=2)
    names, kind = options.split(",kind=")[0].split(","), options.partition("kind=")[2] or "hadamard"
    check(shape, [n for n in names if n != "untie"], kind, "untie" in names)
