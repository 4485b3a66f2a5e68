"""`merge-experts`: what each method makes of a layer, routers that lose rows, bytes, memory, and refusals."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fuseline
from fuseline.compiler import ops
from fuseline.compiler.compensated import compensated
from fuseline.compiler.errors import UserError
from fuseline.compiler.expert_expressions import Mixed, Paired
from fuseline.compiler.expressions import Expression, Param, Planned
from fuseline.compiler.formats.pairs import unpack_experts
from fuseline.compiler.observe.numerics import error
from fuseline.compiler.schemes import Scheme
from fuseline.compiler.weights import finite
from fuseline.models.mixture import TinyMixture
from fuseline.passes.merging import grouping
from fuseline.passes.merging.milo import kurtosis, ranks
from fuseline.passes.merging.options import Ranks
from tests.helpers.mixtures import Separate

EXPERTS = 5  # odd


class Net(nn.Module):
    """One mixture over a router; scoring: softmax, or sigmoid with a correction and two groups."""

    def __init__(self, experts: int = EXPERTS, grouped: bool = False, dtype: torch.dtype = torch.float64):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        rand = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
        self.grouped, self.count = grouped, experts
        self.router = nn.Parameter(rand(experts, 8))
        self.correction = nn.Parameter(rand(experts))
        self.gate_up, self.down = nn.Parameter(rand(experts, 12, 8)), nn.Parameter(rand(experts, 8, 6))
        self.bias = nn.Parameter(rand(experts, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(x, self.router)
        if self.grouped:
            odds = logits.sigmoid()
            choice = odds + self.correction
            best = choice.view(-1, 2, self.count // 2).topk(2, -1)[0].sum(-1).topk(1, -1)[1]
            inside = torch.zeros(len(x), 2, dtype=x.dtype).scatter(1, best, 1.0)
            inside = inside.unsqueeze(-1).expand(-1, 2, self.count // 2).reshape(-1, self.count)
            indices = choice.masked_fill(inside == 0, float("-inf")).topk(2, -1)[1]
            weights = odds.gather(1, indices)
        else:
            weights, indices = logits.softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return ops.moe(x, indices, weights, self.gate_up, self.down, None, self.bias)

    def without(self, rows: list[int], groups: Any, shares: Any) -> Net:
        """The network with these rows of the router and these mixtures of experts."""
        small = Net(len(rows), self.grouped, self.router.dtype)
        small.router.data, small.correction.data = self.router.data[rows], self.correction.data[rows]
        for name in ("gate_up", "down", "bias"):
            own = getattr(self, name).data
            made = [sum(s * own[e] for e, s in zip(g, w, strict=True)) for g, w in zip(groups, shares, strict=True)]
            getattr(small, name).data = torch.stack(made)
        return small


def batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(20, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(dtype)
            for i in range(count)]  # fmt: skip


@torch.no_grad()
def merged(model: nn.Module, options: str, data: list[torch.Tensor] | None = None, more: str = "") -> Any:
    """The rewritten program, its plan and report, on the first of the batches."""
    data = data or batches()
    pipeline = fuseline.Pipeline(f"raise{{allow_empty}},merge-experts{{{options}}}{more}")
    plan = fuseline.analyze(model, pipeline, data) if pipeline.needs_data else None
    captured = fuseline.capture(model, (data[0],))
    program, report = pipeline.run(captured, plan=plan, verification="full")
    return program, plan, report["merge-experts"]


def decision(plan: Any) -> Any:
    (found,) = plan.of("merge-experts").values()
    return found


def bytes_of_experts(program: Any) -> int:
    own = [n for n in program.weights() if {"gate_up", "down"} & set(n.meta["weight"].parameters())]
    return sum(n.meta["val"].nbytes for n in own)


def output(program: Any) -> torch.Tensor:
    return program.run(program.examples)[0]


def by_hand(a: torch.Tensor, b: torch.Tensor, tau: float, norms: torch.Tensor) -> list[torch.Tensor]:
    """PuzzleMoE's section 3, element by element."""
    out = [torch.zeros_like(a), torch.zeros_like(b)]
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            x, y = float(a[i, j]), float(b[i, j])
            if abs(abs(x) - abs(y)) / (abs(x) + abs(y)) <= tau:
                shared, kept = (abs(x) + abs(y)) / 2, (True, True)
            else:
                first = abs(x) * float(norms[0, j]) >= abs(y) * float(norms[1, j])
                shared, kept = abs(x) if first else abs(y), (first, not first)
            for one, value, keeps in zip(out, (x, y), kept, strict=True):
                one[i, j] = shared * (1 if value > 0 else -1) * keeps
    return out


@torch.no_grad()
def test_puzzle_is_its_definition() -> None:
    model = Net()
    program, plan, _ = merged(model, "pack=none")
    found = decision(plan)
    pairs = found.structure["pairs"]
    assert sorted(e for pair in pairs for e in pair) == list(range(EXPERTS))
    assert [len(pair) for pair in pairs] == [2, 2, 1]
    expected = Net()
    for name in ("gate_up", "down"):
        for pair in pairs[:2]:
            own = getattr(model, name).data[pair]
            rows = by_hand(own[0], own[1], 0.4, found.tensors[name][pair])
            getattr(expected, name).data[pair] = torch.stack(rows)
    assert error(output(program), expected(batches()[0])) < 1e-12


@torch.no_grad()
def test_norms_are_those_of_an_experts_own_tokens() -> None:
    model, data = Net(), torch.cat(batches())
    found = decision(merged(model, "")[1])
    indices = torch.nn.functional.linear(data, model.router).softmax(-1).topk(2, -1)[1]
    for e in range(EXPERTS):
        own = data[(indices == e).any(-1)]
        assert found.structure["tokens"][e] == len(own)
        assert error(found.tensors["gate_up"][e], own.norm(dim=0)) < 1e-5
        both = own @ model.gate_up[e].t()
        inner = torch.nn.functional.silu(both[:, :6]) * both[:, 6:]
        assert error(found.tensors["down"][e], inner.norm(dim=0)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "options", ["", "saliency=magnitude", "pairs=searched", "ratio=0.3", "ratio=0.3,pairs=searched"]
)
def test_packed_pairs_are_the_merge_rounded_to_their_words(options: str) -> None:
    model = Net(dtype=torch.bfloat16)
    packed, _, report = merged(model, options, batches(dtype=torch.bfloat16))
    plain, _, _ = merged(model, f"pack=none,{options}".rstrip(","), batches(dtype=torch.bfloat16))
    assert report.rules == {"puzzle": 1} and not report.refused
    (node,) = [n for n in packed.graph.nodes if n.target is ops.moe_pairs.overload]
    assert node.args[3].meta["val"].shape[0] == (4 if "0.3" in options else 3)
    lookup = lambda name: getattr(model, name).data
    values = lambda program, i: _node(program).args[i].meta["weight"].evaluate(lookup)
    rows, slots = values(packed, 5), values(packed, 6)
    for i in (3, 4):
        assert torch.equal(unpack_experts(values(packed, i), rows, slots), values(plain, i))
    assert error(output(packed).float(), output(plain).float()) < 2**-7


@torch.no_grad()
@pytest.mark.parametrize(("pack", "bound", "part"), [("fp8", 0.06, 0.3125), ("int4", 0.3, 0.1875)])
def test_pairs_of_few_bits(pack: str, bound: float, part: float) -> None:
    """Against the merge without packing; bytes: those of bfloat16 times `part`, and the scales."""
    model = Net(dtype=torch.bfloat16)
    data = batches(dtype=torch.bfloat16)
    program, _, report = merged(model, f"pack={pack},group=2", data)
    plain, _, _ = merged(model, "pack=none", data)
    assert report.rules == {"puzzle": 1}
    assert 0 < error(output(program).float(), output(plain).float()) < bound
    codes = sum(n.meta["val"].nbytes for n in program.weights() if n.meta["val"].dtype == torch.uint8)
    whole = sum(t.nbytes for t in (model.gate_up, model.down)) * 6 / 5  # of three rows of pairs
    assert codes == pytest.approx(whole * part, rel=0.2)  # rows are whole bytes


def _node(program: Any) -> torch.fx.Node:
    return next(n for n in program.graph.nodes if n.target in (ops.moe.overload, ops.moe_pairs.overload))


def test_half_the_bytes_of_an_even_number_of_experts() -> None:
    model = TinyMixture(64, 32, 2, 4, 2, experts=8, chosen=2, inner=32).bfloat16().eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        captured = fuseline.capture(model, (ids,))
        program, _ = fuseline.Pipeline("raise,merge-experts{saliency=magnitude}").run(captured)
    names = ("gate_up", "down")
    size = lambda p: sum(n.meta["val"].nbytes for n in p.weights() if any(
        name.endswith(names) for name in n.meta["weight"].parameters()))  # fmt: skip
    places = sum(n.meta["val"].nbytes for n in program.weights() if n.meta["val"].dtype == torch.int32)
    assert (size(program) + places) / size(captured) <= 0.505


def test_tau_widens_what_is_alike() -> None:
    x = torch.tensor([[[1.0, -3.0]], [[2.0, 3.5]]])
    made = lambda tau: Paired(Param("x"), ((0, 1),), tau, packed=False).evaluate(lambda name: x)
    assert made(0.0).tolist() == [[[0.0, 0.0]], [[2.0, 3.5]]]
    assert made(0.3).tolist() == [[[0.0, -3.25]], [[2.0, 3.25]]]
    assert made(0.4).tolist() == [[[1.5, -3.25]], [[1.5, 3.25]]]


@torch.no_grad()
@pytest.mark.parametrize("method", ["average", "hc"])
def test_groups_keep_the_router(method: str) -> None:
    model, x = Net(), batches()[0]
    program, plan, report = merged(model, f"method={method},ratio=0.4")
    assert report.rules == {method: 1}
    assert bytes_of_experts(program) == 3 / 5 * sum(t.nbytes for t in (model.gate_up, model.down))
    if plan is None:
        return
    about = decision(plan).structure
    assert len(about["groups"]) == 3 and sorted(e for g in about["groups"] for e in g) == list(range(EXPERTS))
    small = model.without(about["rows"], about["groups"], about["shares"])
    weights, indices = torch.nn.functional.linear(x, model.router).softmax(-1).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    places = torch.tensor([next(i for i, g in enumerate(about["groups"]) if e in g) for e in range(EXPERTS)])
    expected = ops.moe(x, places[indices], weights, small.gate_up, small.down, None, small.bias)
    assert error(output(program), expected) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("grouped", [False, True], ids=["softmax", "sigmoid in groups"])
@pytest.mark.parametrize("options", ["method=reap", "method=partial-preservation", "method=hc,router=slice"])
def test_a_router_without_rows_is_a_smaller_network(options: str, grouped: bool) -> None:
    model = Net(8 if grouped else EXPERTS, grouped)
    program, plan, report = merged(model, f"{options},ratio={0.5 if grouped else 0.4}")
    assert not report.refused
    about = decision(plan).structure
    small = model.without(about["rows"], about["groups"], about["shares"])
    if grouped:
        assert len([e for e in about["rows"] if e < 4]) == 2  # as many from either group
    assert error(output(program), small(batches()[0])) < 1e-12


def test_reap_leaves_out_what_contributes_least() -> None:
    model = Net()
    with torch.no_grad():
        model.down[1] *= 1e-3
        model.bias[1] *= 1e-3
    about = decision(merged(model, "method=reap,ratio=0.2")[1]).structure
    assert about["rows"] == [0, 2, 3, 4] and about["groups"] == [[0], [2], [3], [4]]


def test_partial_preservation_leaves_the_best_as_they_are() -> None:
    importance = torch.tensor([9.0, 1.0, 8.0, 7.0, 2.0, 6.0])
    alike = torch.zeros(6, 6)
    alike[1, 5] = alike[4, 3] = 1.0
    assert grouping.absorbed(importance, alike, 4) == ((0,), (2,), (3, 4), (5, 1))
    assert grouping.weighted(((3, 4),), importance) == ((7 / 9, 2 / 9),)


def test_clusters_join_what_is_near() -> None:
    points = torch.tensor([[0.0], [10.0], [0.1], [10.2], [5.0]])
    assert grouping.clusters(points, 3) == ((0, 2), (1, 3), (4,))
    assert grouping.clusters(points, 5) == tuple((e,) for e in range(5))


@pytest.mark.parametrize(("experts", "pairs"), [(6, 3), (7, 3), (6, 2), (5, 1)])
def test_searched_pairs_cost_least(experts: int, pairs: int) -> None:
    import itertools

    cost = torch.rand(experts, experts, generator=torch.Generator().manual_seed(experts))
    cost = cost + cost.t()
    found = grouping.searched_pairs(cost, pairs)
    assert sorted(e for group in found for e in group) == list(range(experts))
    total = lambda chosen: sum(float(cost[i, j]) for i, j in chosen)
    every = itertools.combinations(itertools.combinations(range(experts), 2), pairs)
    least = min(total(c) for c in every if len({e for pair in c for e in pair}) == 2 * pairs)
    assert total([group for group in found if len(group) == 2]) == pytest.approx(least, rel=1e-6)


@torch.no_grad()
def test_milo_loses_less_than_its_codes_alone() -> None:
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.parse("int3:g16", weights=True)

    def off(rank: int, rounds: int = 6) -> float:
        made = compensated(x, scheme, rank, rounds)
        groups = made["codes"].unflatten(-1, (-1, 16)).float() - made["zero"].unsqueeze(-1).float()
        rounded = (groups * made["scale"].unsqueeze(-1)).flatten(-2)
        return float((x - rounded - made["up"].t() @ made["down"]).square().sum())

    assert off(4) < off(2) < off(0)
    assert off(4, 6) <= off(4, 1)


@torch.no_grad()
@pytest.mark.parametrize("compensator", ["none", "int8:sym"])
def test_milo_in_a_program(compensator: str) -> None:
    model = Net()
    options = f"method=milo,weights=int3:channel,rank=2,rounds=3,compensator={compensator}"
    program, _, report = merged(model, options)
    assert report.rules == {"milo": 1}
    assert sum(n.target is ops.lowrank_add.overload for n in program.graph.nodes) == 2
    plain, _, _ = merged(model, options.replace("rank=2", "rank=0"))
    reference = model(batches()[0])
    assert error(output(program), reference) < error(output(plain), reference) < 0.5


def test_ranks_follow_their_policy() -> None:
    tails, often = [0.0, 1.0, 3.0, 0.0], [0.5, 0.25, 0.25, 0.0]
    assert ranks(Ranks.UNIFORM, 8, tails, often, 64) == [8] * 4
    heavy = ranks(Ranks.KURTOSIS, 8, tails, often, 64)
    assert sum(heavy) == 32 and heavy[2] == max(heavy) and heavy[0] == heavy[3] == min(heavy)
    assert ranks(Ranks.FREQUENCY, 8, tails, often, 64) == [16, 8, 8, 0]
    assert (
        ranks(Ranks.FREQUENCY, 8, tails, often, 10) == [10, 10, 10, 2]
        or sum(ranks(Ranks.FREQUENCY, 8, tails, often, 10)) == 32
    )
    draw = torch.Generator().manual_seed(0)
    assert abs(kurtosis([torch.randn(400, 400, generator=draw)])) < 0.1


@torch.no_grad()
def test_quantize_behind_a_merge() -> None:
    model = Net()
    program, _, report = merged(model, "method=reap,ratio=0.4", more=",quantize{weights=int8}")
    plain, _, _ = merged(model, "method=reap,ratio=0.4")
    assert not report.refused and 0 < error(output(program), output(plain)) < 0.05
    codes = [n for n in program.weights() if n.meta["val"].dtype == torch.int8]
    assert {tuple(n.meta["val"].shape) for n in codes} == {(36, 8), (24, 6), (5, 8)}  # and the router


@torch.no_grad()
def test_experts_in_modules_merge_too() -> None:
    model = Separate("dense", experts=4).double()
    program, _, report = merged(model, "method=average")
    assert report.rules == {"average": 1}
    assert output(program).shape == (20, 8)


def test_a_plan_is_the_same_again(tmp_path: Any) -> None:
    model, pipeline = Net(), "raise{allow_empty},merge-experts"
    plan = fuseline.analyze(model, pipeline, batches())
    again = fuseline.analyze(model, pipeline, batches())
    assert decision(plan).structure == decision(again).structure
    loaded = fuseline.Plan.load(plan.save(tmp_path / "plan.json"))
    with torch.no_grad():
        captured = fuseline.capture(model, (batches()[0],))
        one, other = (fuseline.Pipeline(pipeline).run(captured, plan=p)[0] for p in (plan, loaded))
    assert torch.equal(output(one), output(other))
    of = lambda seed: fuseline.analyze(model, pipeline.replace("experts", f"experts{{seed={seed}}}"), batches())
    seeds = {str(decision(of(seed)).structure) for seed in range(4)}
    assert len(seeds) > 1


def test_expressions_are_written_and_read() -> None:
    for expression in (
        Mixed(Param("x"), ((0, 2), (1,)), ((0.25, 0.75), (1.0,)), True),
        Paired(Param("x"), ((0, 2), (1,)), 0.4, Planned("0", (3, 4), torch.float32, "cpu"), False),
    ):
        assert Expression.from_json(expression.to_json()) == expression


class Live(TorchDispatchMode):
    """most: the bytes that tensors made inside the block took at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@torch.no_grad()
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["paired", "mixed"])
def test_memory_beside_the_model_while_merging(kind: str, turned: bool) -> None:
    """Of both stacks of a layer: the results, and little else; what the weight store looks at before is counted."""
    stacks = {"gate_up": torch.randn(8, 3072, 1024).bfloat16(), "down": torch.randn(8, 1024, 1536).bfloat16()}
    stacks = {name: stack.transpose(1, 2).contiguous() if turned else stack for name, stack in stacks.items()}
    norms = Planned.of(torch.rand(8, 1), "cpu")
    layer = sum(stack.nbytes for stack in stacks.values())
    pairs, shares = tuple((2 * i, 2 * i + 1) for i in range(4)), ((0.5, 0.5),) * 4
    kept, x = [], Param("x")
    with Live() as live:
        for stack in stacks.values():
            made = Paired(x, pairs, 0.4, norms, True, turned) if kind == "paired" else Mixed(x, pairs, shares, turned)
            assert finite(stack)
            kept.append(made.evaluate(lambda _, stack=stack: stack))
    assert 0.5 * layer == sum(made.nbytes for made in kept) < live.most <= 1.3 * layer


def test_nan_and_large_weights_are_refused_with_a_remedy() -> None:
    model = Net(4)
    with torch.no_grad():
        model.gate_up[0, 0, 0] = 2.0**17
    with pytest.raises(UserError, match="fits no packed pair") as caught:
        output(merged(model, "saliency=magnitude")[0])
    assert "pack=none" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("ratio=0.6", "0.5 at most, since two experts share a row"),
        ("ratio=0", "lies above 0"),
        ("method=reap,ratio=1", "below 1"),
        ("tau=1", "holds for all from 1 on"),
        ("method=reap,router=map", "keeps one row of the router for each expert that stays"),
        ("router=slice", "leaves the router as it is"),
        ("method=milo,weights=int9", "unknown number format"),
        ("method=puzle", "cannot be 'puzle'"),
        ("method=milo,rounds=0", "fitted once at least"),
    ],
)
def test_options_that_do_not_go_together(options: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        fuseline.Pipeline(f"raise,merge-experts{{{options}}}")


def test_what_is_refused_says_why() -> None:
    model = Net()
    with torch.no_grad(), pytest.raises(UserError, match="no site") as caught:
        merged(model, "method=reap,ratio=0.8")
    assert "2 experts are chosen for each token, and 1 would be left" in str(caught.value)
    with torch.no_grad(), pytest.raises(UserError, match="no site") as caught:
        fuseline.Pipeline("raise{allow_empty},merge-experts{saliency=magnitude}").run(
            fuseline.capture(nn.Linear(8, 8), (torch.randn(2, 8),))
        )
    assert "no layer of routed experts that raise recognises" in str(caught.value)
    with pytest.raises(Exception, match="needs raised"):
        fuseline.Pipeline("merge-experts{saliency=magnitude}").run(fuseline.capture(model, (batches()[0],)))


def test_experts_that_are_merged_already_are_refused() -> None:
    pipeline = "raise{allow_empty},merge-experts{saliency=magnitude},merge-experts{saliency=magnitude,allow_empty}"
    with torch.no_grad():
        _, report = fuseline.Pipeline(pipeline).run(fuseline.capture(Net(), (batches()[0],)))
    assert list(report.passes[-1].refused.values()) == ["its experts are packed in pairs already"]


def test_experts_that_no_token_chose_are_told_of() -> None:
    model = Net(8)
    with torch.no_grad():
        model.router[5] = 0
        model.router[5, 0] = -1e3
    data = [x.abs() for x in batches()]
    _, plan, _ = merged(model, "", data)
    about = decision(plan)
    assert about.structure["unseen"] >= 1 and about.structure["tokens"][5] == 0
    assert about.tensors["gate_up"].min() > 0  # the mean token's, not nothing
    step = fuseline.Pipeline("raise,merge-experts").passes[1]
    lines = step.findings(plan.of("merge-experts")).lines
    assert any("chosen by no token" in line for line in lines)
