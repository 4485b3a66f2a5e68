"""Compare: the rewrite that is off is named, whatever comes after it; rounding is not accused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import fuseline
from fuseline import Pass, Pipeline, Program, Rule, UserError
from fuseline.compiler.debug.cells import flatten
from fuseline.compiler.debug.compare import compare
from fuseline.compiler.debug.correspondence import Correspondence
from fuseline.compiler.debug.schedule import Schedule
from fuseline.compiler.framework import Tier
from fuseline.compiler.ops import rms_norm
from fuseline.compiler.order import sort
from fuseline.compiler.outline import cut
from fuseline.compiler.pattern import call
from tests.helpers.models import Mlp, tiny_llama, traced

aten = torch.ops.aten


@pytest.fixture
def mlp() -> Program:
    torch.manual_seed(0)
    return fuseline.capture(Mlp(), (torch.randn(4, 8),), dynamic={"x": {0: torch.export.Dim.AUTO}})


@pytest.fixture(scope="module")
def llama() -> Program:
    return captured(torch.float32)


def captured(dtype: torch.dtype) -> Program:
    model = tiny_llama().to(dtype)
    ids = torch.randint(0, 100, (1, 16), generator=torch.Generator().manual_seed(0))
    return fuseline.capture(model, (ids,), {"use_cache": False})


def passes(*texts: str | Pass) -> Pipeline:
    return Pipeline([p for t in texts for p in ([t] if isinstance(t, Pass) else Pipeline(t).passes)])


@dataclass(frozen=True)
class Norms(Pass):
    """Builds each RMSNorm again, one of them (`at`, from 0) by `how`."""

    name = "norms"
    at: int = 1
    how: str = "same"
    eps: float = 1e-2

    def run(self, program, rewriter):
        for i, node in enumerate(n for n in program.graph.nodes if n.target is rms_norm.overload):
            how = self.how if i == self.at else "same"
            rewriter.rewrite(node, [node], lambda new, node=node, how=how: self.build(new, node.args, how), "again")

    def build(self, new, args, how):
        if how == "eps":
            return new(rms_norm, *args[:2], self.eps, *args[3:])
        again = new(rms_norm, *args)
        if how == "narrow":
            return new(aten.to.dtype, new(aten.to.dtype, again, torch.bfloat16), torch.float32)
        if how == "infinite":
            return new(aten.div.Tensor, new(aten.mul.Tensor, again, 2.0), 0.0)
        return new(aten.div.Tensor, new(aten.mul.Tensor, again, 3.0), 3.0) if how == "regrouped" else again


@dataclass(frozen=True)
class Copies(Pass):
    """Replaces each call of an op by itself: exact, and it touches everything that a pass before it made."""

    name = "copies"
    op: object = None

    def run(self, program, rewriter):
        for node in list(program.graph.nodes):
            if node.target is self.op:
                rewriter.rewrite(node, [node], lambda new, node=node: new(node.target, *node.args), "copy")


@pytest.mark.parametrize("pipeline", ["raise,fuse", "raise", "fuse"])
def test_sound_passes_add_only_rounding(llama: Program, pipeline: str) -> None:
    found = compare(llama, Pipeline(pipeline))
    assert found.ok and not found.faults and found.unexplained is None
    assert all(n.ok for n in found.nodes) and all(o.ok for o in found.outputs)
    assert found.unclaimed == 0  # what these passes leave stands for a captured node, in regions too
    assert {n.stands_for for n in found.nodes} <= {c.name for c in flatten(llama).cells}
    assert 0 < max(n.noise for n in found.nodes) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_sound_passes_add_only_rounding_in_other_precisions(dtype: torch.dtype) -> None:
    program = captured(dtype)
    found = compare(program, Pipeline("raise,fuse"))
    assert found.ok and found.dtype == str(dtype).removeprefix("torch.")
    wrong = compare(program, passes("raise", Norms(how="eps", eps=0.5), "fuse"))
    assert wrong.first is not None and wrong.first.rewrite.pass_name == "norms"


def test_a_wrong_rewrite_is_named_with_its_rule_site_and_line(llama: Program) -> None:
    found = compare(llama, passes("raise", Norms(how="eps"), "fuse"))
    first = found.first
    assert not found.ok and first is not None and first.verdict == "formula"
    assert (first.rewrite.pass_name, first.rewrite.rule) == ("norms", "again")
    assert first.rewrite.site == "model.layers.0.post_attention_layernorm/rms_norm#0"
    assert first.rewrite.location is not None and first.rewrite.location.startswith(__file__)
    assert first.rewrite.line is not None and "modeling_llama.py" in first.rewrite.line
    assert first.local > 100 * first.noise


def test_an_error_is_charged_where_it_is_made_and_nowhere_else(llama: Program) -> None:
    found = compare(llama, passes("raise", Norms(how="eps"), "fuse"))
    assert len(found.faults) == 1  # though everything behind it is off, too
    off = [n for n in found.nodes if not n.ok]
    assert len(off) > 20 and all(n.explained for n in off)
    after = {p.name: p.error for p in found.passes}
    assert after["raise"] < 1e-5 < after["norms"] == pytest.approx(after["fuse"])


@pytest.mark.parametrize("later", ["copies", "quantize{weights=int8}", "fuse"])
def test_later_passes_are_not_charged_with_it(llama: Program, later: str) -> None:
    step = Copies(op=rms_norm.overload) if later == "copies" else later
    found = compare(llama, passes("raise", Norms(how="eps"), step))
    assert [f.rewrite.pass_name for f in found.faults] == ["norms"]


def test_a_fault_inside_what_a_later_rewrite_replaces_stays_with_its_maker(mlp: Program) -> None:
    """The later rewrite swallows the wrong node: what it must equal is the computation that it found."""

    @dataclass(frozen=True)
    class Swallow(Pass):
        name = "swallow"

        def run(self, program, rewriter):
            silu = next(n for n in program.graph.nodes if n.target is aten.silu.default)
            product = next(iter(silu.users))
            other = next(a for a in product.args if a is not silu)
            rewriter.rewrite(
                silu, [silu], lambda new: new(aten.mul.Tensor, new(aten.silu.default, silu.args[0]), 2), "wrong"
            )
            inner = next(a for a in product.args if a is not other)
            halves = (inner, inner.args[0], product)
            build = lambda new: new(
                aten.mul.Tensor, new(aten.mul.Tensor, new(aten.silu.default, inner.args[0].args[0]), other), 2
            )
            rewriter.rewrite(product, halves, build, "right")

    found = compare(mlp, passes(Swallow()))
    assert [(f.rewrite.rule, f.verdict) for f in found.faults] == [("wrong", "formula")]


def test_a_difference_just_above_rounding_is_found_and_one_below_is_only_noted(llama: Program) -> None:
    above = compare(llama, passes("raise", Norms(how="eps", eps=1.002e-6)))
    assert above.first is not None and above.first.verdict == "formula"
    assert above.first.local < 1e-5
    below = compare(llama, passes("raise", Norms(how="eps", eps=1e-6 * (1 + 1e-9))))
    assert below.ok and "below rounding" in [r.verdict for r in below.rewrites]


def test_losing_precision_is_told_from_another_formula(llama: Program) -> None:
    found = compare(llama, passes("raise", Norms(how="narrow")))
    assert found.first is not None and found.first.verdict == "precision"
    assert found.first.change < 1e-12 < found.first.local
    assert compare(llama, passes("raise", Norms(how="regrouped"))).ok


def test_the_first_value_that_is_not_finite_is_named(llama: Program) -> None:
    found = compare(llama, passes("raise", Norms(how="infinite"), "fuse"))
    assert found.first is not None and found.first.verdict == "not finite"
    assert found.not_finite is not None and found.not_finite.startswith("div")


def test_lossy_rewrites_are_listed_and_not_accused(llama: Program) -> None:
    found = compare(llama, Pipeline("raise,quantize{weights=int4:g32},fuse"))
    lossy = [r for r in found.rewrites if r.verdict == "lossy"]
    assert found.ok and found.lossy and len(lossy) == 14
    assert all(1e-3 < r.local < 1 for r in lossy)
    assert max(o.error for o in found.outputs) > 1e-3
    wrong = compare(llama, passes("raise", "quantize{weights=int4:g32}", Norms(how="eps", at=3), "fuse"))
    assert [f.rewrite.pass_name for f in wrong.faults] == ["norms"]


def test_a_lossy_pass_that_gives_nan_is_at_fault(mlp: Program) -> None:
    @dataclass(frozen=True)
    class Careless(Pass):
        name, tier = "careless", Tier.LOSSY

        def run(self, program, rewriter):
            node = next(n for n in program.graph.nodes if n.target is aten.silu.default)
            rewriter.rewrite(
                node, [node], lambda new: new(aten.log.default, new(aten.sub.Tensor, node.args[0], 1e3)), "log"
            )

    found = compare(mlp, passes(Careless()))
    assert not found.ok and found.not_finite == "log_default"


def written(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    before = cache * 2.0
    cache.copy_(x)
    return before + cache.sin()


@dataclass(frozen=True)
class Late(Pass):
    """Moves a read past a write, besides a rewrite that is right."""

    name = "late"
    moves: bool = True

    def run(self, program, rewriter):
        nodes = list(program.graph.nodes)
        read = next(n for n in nodes if n.target is aten.mul.Tensor)
        write = next(n for n in nodes if n.target is aten.copy_.default)
        add = next(n for n in nodes if n.target is aten.add.Tensor)
        if self.moves:
            write.append(read)
        rewriter.rewrite(add, [add], lambda new: new(aten.add.Tensor, *add.args), "copy")


def test_rewrites_that_are_right_in_the_wrong_order_are_found() -> None:
    program = traced(written, torch.randn(4, 4), torch.randn(4, 4))
    assert compare(program, passes(Late(moves=False))).ok
    found = compare(program, passes(Late()))
    assert not found.ok and found.first is None
    assert found.unexplained is not None and found.unexplained.op == "mul"


def test_inputs_that_are_written_to_are_compared_after_the_run() -> None:
    @dataclass(frozen=True)
    class Other(Pass):
        name = "other"

        def run(self, program, rewriter):
            node = next(n for n in program.graph.nodes if n.target is aten.neg.default)
            rewriter.rewrite(node, [node], lambda new: new(aten.mul.Tensor, node.args[0], -1.001), "scaled")

    def function(cache, x):
        cache.copy_(-x)
        return x + 1.0

    program = traced(function, torch.randn(4, 4), torch.randn(4, 4))
    found = compare(program, passes(Other()))
    states = [o for o in found.outputs if o.name.startswith("state")]
    assert len(states) == 1 and not states[0].ok
    assert found.first is not None and found.first.rewrite.rule == "scaled"
    untouched = [o for o in found.outputs if o.name.startswith("output")]
    assert all(o.ok for o in untouched)


@pytest.mark.slow
def test_a_decoding_step_over_a_static_cache() -> None:
    """The graphs that Dynamo captures, on the arguments of a call, caches that are written in place among them."""
    from fuseline.compiler.capture import from_dynamo
    from fuseline.compiler.precision import clone

    seen: list[tuple[Program, list[object]]] = []

    def backend(module, inputs):
        program = from_dynamo(module, inputs)

        def run(*flat):
            if all(program is not known for known, _ in seen):
                seen.append((program, [clone(x) for x in flat]))
            return program.run(flat)

        return run

    model = tiny_llama()
    model.compile(backend=backend)
    with torch.no_grad():
        model.generate(torch.ones(2, 6, dtype=torch.int64), max_new_tokens=4, cache_implementation="static")
    torch.compiler.reset()
    assert [len(program.mutated) for program, _ in seen] == [2, 6]
    for program, flat in seen:
        assert compare(program, Pipeline("raise,fuse"), flat).ok
    decode, flat = seen[1]
    lossy = compare(decode, Pipeline("raise,quantize{weights=int8},fuse"), flat)
    states = {o.name: o.error for o in lossy.outputs if o.name.startswith("state")}
    assert lossy.ok and len(states) == 6 and max(states.values()) > 1e-4
    wrong = compare(decode, passes("raise", "quantize{weights=int8}", Norms(how="eps"), "fuse"), flat)
    assert [f.rewrite.pass_name for f in wrong.faults] == ["norms"]


def test_the_callers_tensors_stay_as_they_are() -> None:
    flat = [torch.randn(4, 4), torch.randn(4, 4)]
    program = traced(written, *flat)
    held = [t.clone() for t in program.examples]
    compare(program, passes(Late(moves=False)))
    assert all(torch.equal(a, b) for a, b in zip(program.examples, held, strict=True))


def test_a_lossy_value_in_a_cache_explains_what_is_read_from_it() -> None:
    @dataclass(frozen=True)
    class Rough(Pass):
        name = "rough"
        tier = Tier.LOSSY

        def run(self, program, rewriter):
            node = next(n for n in program.graph.nodes if n.target is aten.neg.default)
            rewriter.rewrite(node, [node], lambda new: new(aten.mul.Tensor, node.args[0], -1.01), "rough")

    def function(cache, x):
        cache.copy_(-x)
        return cache.sin()  # reads the cache itself, not what the copy returns

    found = compare(traced(function, torch.randn(4, 4), torch.randn(4, 4)), passes(Rough()))
    assert found.ok and not all(n.ok for n in found.nodes)


@dataclass(frozen=True)
class Respelled(Pass):
    """Writes ops in another way, equal but for rounding."""

    name = "respelled"

    def run(self, program, rewriter):
        for node in list(program.graph.nodes):
            how = getattr(self, getattr(node.target, "_opname", "none"), None)
            if how is not None:
                rewriter.rewrite(node, [node], lambda new, node=node, how=how: how(new, *node.args), node.name)

    def silu(self, new, x):
        return new(aten.mul.Tensor, x, new(aten.sigmoid.default, x))

    def rsqrt(self, new, x):
        return new(aten.reciprocal.default, new(aten.sqrt.default, x))

    def mean(self, new, x, dims, keep):
        return new(aten.div.Tensor, new(aten.sum.dim_IntList, x, dims, keep), x.meta["val"].shape[-1])

    def linear(self, new, x, weight):
        """The products of two halves, added."""
        size = weight.meta["val"].shape[1]
        halves = [
            new(
                aten.matmul.default,
                new(aten.slice.Tensor, x, -1, a, b),
                new(aten.t.default, new(aten.slice.Tensor, weight, 1, a, b)),
            )
            for a, b in ((0, size // 2), (size // 2, size))
        ]
        return new(aten.add.Tensor, *halves)

    def scaled_dot_product_attention(self, new, q, k, v, mask):
        scale = q.meta["val"].shape[-1] ** -0.5
        logits = new(aten.mul.Tensor, new(aten.matmul.default, q, new(aten.transpose.int, k, -1, -2)), scale)
        hidden = new(aten.masked_fill.Scalar, logits, new(aten.logical_not.default, mask), float("-inf"))
        return new(aten.matmul.default, new(aten.softmax.int, hidden, -1), v)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.bfloat16, torch.float16))],
)
def test_everything_in_another_spelling_is_rounding(llama: Program, dtype: torch.dtype) -> None:
    found = compare(llama if dtype is torch.float32 else captured(dtype), passes(Respelled()))
    assert len(found.rewrites) == 29 and found.ok
    assert {r.verdict for r in found.rewrites} == {"rounding"}
    assert any(r.local != r.noise for r in found.rewrites)  # it does round in another way


class DoubleNegation(Rule):
    def before(self, x):
        return call("neg", -x)

    def after(self, m, new):
        return m.x


class Forgotten(DoubleNegation):
    def before(self, x):
        return -x


def by(rule: Rule) -> Pipeline:
    @dataclass(frozen=True)
    class One(Pass):
        name = "one"

        def rules(self, program):
            yield rule

    return passes(One())


def test_a_node_that_takes_another_ones_place_must_equal_both() -> None:
    program = traced(lambda x: torch.sin(torch.neg(-x)), torch.randn(8))
    assert compare(program, by(DoubleNegation())).ok
    found = compare(program, by(Forgotten()))
    assert found.first is not None and found.first.rewrite.rule == "Forgotten" and found.first.local == 2.0


def test_a_change_that_the_next_rewrite_makes_good_is_no_fault() -> None:
    """One rewrite negates a value, the next one its user: neither is right by itself, the two are."""

    @dataclass(frozen=True)
    class Signs(Pass):
        name = "signs"
        second: bool = True

        def run(self, program, rewriter):
            square = next(n for n in program.graph.nodes if n.target is aten.mul.Tensor)
            user = next(n for n in program.graph.nodes if n.target is aten.sub.Tensor)
            negative = lambda new: new(aten.neg.default, new(aten.mul.Tensor, *square.args))
            rewriter.rewrite(square, [square], negative, "negated")
            if self.second:
                turned = user.args[1]
                rewriter.rewrite(user, [user], lambda new: new(aten.add.Tensor, user.args[0], turned), "added")

    program = traced(lambda x, y: torch.cos(x - y * y), torch.randn(8), torch.randn(8))
    both = compare(program, passes(Signs()))
    assert both.ok and {r.verdict for r in both.rewrites} == {"regrouped"}
    assert not compare(program, passes(Signs(second=False))).ok


def test_a_region_that_is_not_a_copy_is_measured(mlp: Program) -> None:
    @dataclass(frozen=True)
    class Crossed(Pass):
        """Cuts a region out and exchanges its results."""

        name = "crossed"
        how: str = "crossed"

        def run(self, program, rewriter):
            nodes = [n for n in program.graph.nodes if n.target is aten.linear.default][:2]
            piece = cut(program, nodes, "linear")

            def build(new):
                built = new.region("linear", piece)
                if self.how == "crossed":
                    first, second = built
                    return {first: built[second], second: built[first]}
                if self.how == "op":
                    inner = next(n for n in piece.module.graph.nodes if n.op == "call_function")
                    inner.args = (*inner.args[:2], None)
                return built

            rewriter.rewrite(nodes[-1], nodes, build, "region")
            sort(program.graph)

    right = compare(mlp, passes(Crossed(how="right")))
    assert right.ok and right.passes[0].verdicts == {"moved": 1} and right.unclaimed == 0
    wrong = compare(mlp, passes(Crossed()))
    assert not wrong.ok and wrong.first is not None and wrong.first.rewrite.rule == "region"


def test_few_values_are_held_at_a_time() -> None:
    def chain(x):
        for _ in range(200):
            x = torch.sin(x)
        return x

    program = traced(chain, torch.randn(8))
    followed = Correspondence()
    Pipeline([Copies(op=aten.sin.default)]).run(program, [followed])
    after = flatten(followed.program)
    claimed = {after.of[n]: claims for n, claims in followed.claims.of.items() if n in after.of}
    schedule = Schedule(followed.claims, after, claimed)
    held = [sum(c.position <= t <= last for c, last in schedule.last.items()) for t in range(200)]
    assert max(held) < 8


def test_attention_and_masks_do_not_confuse_it(llama: Program) -> None:
    found = compare(llama, Pipeline("raise"))
    attentions = [r for r in found.rewrites if r.rewrite.rule == "Attention"]
    assert len(attentions) == 2 and all(r.verdict in ("rounding", "below rounding") for r in attentions)


def test_a_program_that_draws_random_numbers_is_refused() -> None:
    program = traced(lambda x: torch.nn.functional.dropout(x, 0.5, True) + 1.0, torch.randn(8))
    with pytest.raises(UserError, match=r"'dropout' draws random numbers: two runs of this program differ"):
        compare(program, passes(Copies(op=aten.add.Tensor)))


def test_a_program_without_inputs_is_refused(mlp: Program) -> None:
    with pytest.raises(UserError, match="a comparison needs the values of its inputs"):
        compare(mlp.without_tensors(), Pipeline("raise"))


def test_progress_is_told(mlp: Program) -> None:
    told: list[tuple[int, int]] = []
    compare(mlp, Pipeline("raise"), progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == len(told)


def test_what_is_measured_is_data(llama: Program) -> None:
    data = compare(llama, Pipeline("raise,fuse")).to_json()
    assert {"ok", "first", "nodes", "rewrites", "passes", "outputs", "unexplained", "not_finite"} <= data.keys()
    assert [p["name"] for p in data["passes"]] == ["raise", "fuse"]
    assert all({"node", "stands_for", "error", "noise", "rewrite"} <= n.keys() for n in data["nodes"])
