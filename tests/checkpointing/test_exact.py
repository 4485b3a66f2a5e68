"""Gradients under every choice are those without it, bit for bit; the partition is the schedule that was counted."""

import contextlib
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fuseline.compiler.action import Observer
from fuseline.compiler.compat_joint import is_random
from fuseline.compiler.costs import FREE, cost
from fuseline.compiler.errors import UserError
from fuseline.compiler.tape import execute, peak, tape
from fuseline.models.decoder import TinyDecoder
from tests.helpers.joint import Traced, agree, kept, uncheckpointed

CHOICES = (
    "checkpoint",
    "checkpoint{policy=full}",
    "checkpoint{policy=min-cut}",
    "checkpoint{policy=budget,memory=0.6}",
    "checkpoint{policy=budget,memory=0.9,offload=cpu}",
    "checkpoint{policy=full,offload=cpu}",
)


class WithLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return F.cross_entropy(self.model(ids).flatten(0, 1), ids.flatten())


class Dropping(nn.Module):
    """GPT-2's block, dropout on attention's weights, on its output and on the feed-forward's."""

    def __init__(self, width=16, rate=0.2, experts=0):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.router = nn.Linear(width, experts) if experts else None
        self.experts = nn.Parameter(torch.randn(experts, width, width) / 8) if experts else None
        self.rate = rate

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.rate)
        x = x + F.dropout(self.o(mixed.transpose(1, 2).flatten(2)), self.rate)
        h = self.second(x)
        if self.router is not None:  # the best two of the experts, dense
            weights, which = self.router(h).softmax(-1).topk(2, -1)
            chosen = self.experts[which]  # [B, S, 2, width, width]
            return x + (weights[..., None] * (h[..., None, None, :] @ chosen).squeeze(-2)).sum(-2)
        return x + F.dropout(self.down(F.gelu(self.up(h))), self.rate)


def models():
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 12))
    x = torch.randn(2, 12, 16)
    yield "decoder", WithLoss(TinyDecoder(64, 16, 4, 4, 2)), ids
    yield "dropout", nn.Sequential(*(Dropping() for _ in range(4))), x
    yield "experts", nn.Sequential(*(Dropping(rate=0.0, experts=4) for _ in range(4))), x


@pytest.fixture(scope="module", params=["decoder", "dropout", "experts"])
def traced(request):
    return next(Traced(model, x) for name, model, x in models() if name == request.param)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_are_equal_bit_for_bit(traced, choice):
    forward, backward, joint = traced.split(choice)
    assert joint.report["checkpoint"].matched
    assert agree(traced.step(forward, backward), uncheckpointed(traced))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("choice", CHOICES[:4])
def test_the_partition_is_the_schedule_that_was_counted(traced, choice):
    """The split keeps the storages, runs the calls, and in the order, that the simulation says."""
    from fuseline.passes.checkpointing.policies import choose

    forward, backward, joint = traced.split(choice)
    step = joint.pipeline.passes[0]
    problem = step.problem(traced.program())
    execution = choose(problem, step.policy, step.limit(problem)).execution
    found = problem.tape
    counted = {found.nodes[found.storages[s].owner].name for s in execution.saved}
    roots = set()
    for node in kept(backward):
        if isinstance(node.meta["val"], torch.Tensor) and not node.name.startswith("rng_state"):
            source = next(n for n in found.nodes if n.name == node.name)
            roots |= {found.nodes[found.storages[s].owner].name for s in found.holds[found.nodes.index(source)]}
    assert roots <= counted | {found.nodes[found.storages[s].owner].name for s in found.results}
    ran = Counter(n.name for n in backward.graph.nodes if _computes(n))
    again = Counter(found.nodes[i].name for i in execution.backward.steps if _computes(found.nodes[i]))
    by_name = {n.name: n for n in found.nodes}
    assert all(is_random(by_name[name]) for name in again - ran)  # they run inside of what restores the state
    assert not [name for name in ran - again if name in by_name]
    counted = execution.backward.at(problem.sizes).max()
    if again - ran:  # what restores a random state hands out values that the graph shows twice
        return
    assert abs(alive(backward) - counted) <= 0.03 * counted


def _computes(node):
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, (torch.Tensor, tuple)) and cost(node) is not FREE


def alive(module):
    """The most bytes alive at once while a graph runs, parameters, inputs and random states (5 KB each) apart."""
    nodes = list(module.graph.nodes)
    first, last, sizes, owned = {}, {}, {}, set()
    for i, node in enumerate(nodes):
        for source in (node, *node.all_input_nodes):
            for tensor in torch.utils._pytree.tree_leaves(source.meta.get("val")):
                if isinstance(tensor, torch.Tensor):
                    key = tensor.untyped_storage()._cdata
                    first.setdefault(key, i if source.op != "placeholder" else 0)
                    last[key], sizes[key] = i, tensor.untyped_storage().nbytes()
                    if source.op == "placeholder" and str(source.target).startswith(("primals", "rng_state")):
                        owned.add(key)
    return max(sum(sizes[k] for k in sizes if k not in owned and first[k] <= i <= last[k]) for i in range(len(nodes)))


class _Deny(Observer):
    """Skips what a pass decides at some sites."""

    def __init__(self, which):
        self.which = which

    def allows(self, action):
        return not self.which(action)


@pytest.mark.one_in(3)
def test_a_skipped_decision_is_kept(traced):
    forward, backward, joint = traced.split("checkpoint{policy=full}", (_Deny(lambda a: a.number % 3 == 0),))
    assert agree(traced.step(forward, backward), uncheckpointed(traced))
    _, every, _ = traced.split("checkpoint{policy=full}")
    assert len(kept(backward)) > len(kept(every))


@pytest.mark.one_in(3)
def test_a_limit_that_cannot_be_met_is_refused_with_the_smallest(traced):
    with pytest.raises(UserError) as refused:
        traced.split("checkpoint{policy=budget,memory=0.01}")
    text = str(refused.value)
    assert "the smallest that can be reached is" in text and "at its fullest step are alive" in text
    least = text.split("memory=")[-1].split(" ")[0]
    size = float(least.removesuffix("MB")) * 1e6
    owned = sum(v.numel() * v.element_size() for v in traced.values)
    _, _, joint = traced.split(
        f"checkpoint{{policy=budget,memory={(size + owned) / 1e6:.6f}MB}}"
    )  # and that one is met
    assert joint.report["checkpoint"].matched


@pytest.mark.parametrize("policy", ["budget,memory=0.9", "full"])
def test_offloaded_values_go_to_the_host_and_come_back_before_their_readers(policy):
    traced = Traced(nn.Sequential(*(Dropping(rate=0.0) for _ in range(6))), torch.randn(2, 12, 16))
    forward, backward, _ = traced.split(f"checkpoint{{policy={policy},offload=cpu}}")
    sent = [n for n in forward.graph.nodes if "to_host" in str(n.target)]
    fetched = [n for n in backward.graph.nodes if "from_host" in str(n.target)]
    assert sent and len(sent) == len(fetched)
    order = {n: i for i, n in enumerate(backward.graph.nodes)}
    ahead = []
    for node in fetched:
        wait = next(u for u in node.users if "arrived" in str(u.target))
        readers = [u for u in node.users if u is not wait]
        assert order[node] < order[wait] < min(map(order.__getitem__, readers))
        ahead.append(order[wait] - order[node])
    assert sum(a > 1 for a in ahead) >= len(ahead) - 2  # the first few have nothing to hide behind
    assert agree(traced.step(forward, backward), uncheckpointed(traced))


def test_without_gradients_the_pass_is_left_out():
    model, x = Dropping(rate=0.0), torch.randn(2, 12, 16)
    torch._dynamo.reset()
    run = torch.compile(model, backend="fuseline", options={"pipeline": "raise{allow_empty},checkpoint"})
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))


# users' own regions


def keeps_products(context, op, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


class Regions(nn.Module):
    """Blocks of which some are checkpointed by the user: wholly, or by a policy of the user's."""

    def __init__(self, kind, count=4):
        super().__init__()
        self.kind, self.blocks = kind, nn.ModuleList(Dropping(rate=0.1) for _ in range(count))

    def forward(self, x):
        contexts = partial(create_selective_checkpoint_contexts, keeps_products)
        for i, block in enumerate(self.blocks):
            if self.kind == "none" or i % 2:
                x = block(x)
            elif self.kind == "whole":
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x.square().mean()


def compiled(model, x, pipeline):
    """Gradients through the backend, and the backward it compiled."""
    from fuseline.compiler import joint as joint_level

    seen = []
    split = joint_level.Joint.split

    def watched(self, *args, **given):
        seen.append(split(self, *args, **given))
        return seen[-1]

    torch._dynamo.reset()
    model.zero_grad()
    joint_level.Joint.split = watched
    try:
        torch.manual_seed(1)
        torch.compile(model, backend="fuseline", options={"pipeline": pipeline})(x).backward()
    finally:
        joint_level.Joint.split = split
    return [p.grad.clone() for p in model.parameters()], seen[0][1] if seen else None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "policy"])
def test_the_users_regions_are_kept(kind):
    torch.manual_seed(0)
    plain, x = Regions("none"), torch.randn(2, 12, 16)
    theirs, _ = compiled(plain, x, "raise{allow_empty}")
    model = Regions(kind)
    model.load_state_dict(plain.state_dict())
    found = {}
    for pipeline in ("raise{allow_empty}", "raise{allow_empty},checkpoint{policy=none}"):
        gradients, backward = compiled(model, x, pipeline)
        assert agree(gradients, theirs)
        found[pipeline] = [n.target for n in backward.graph.nodes if n.op == "call_function"]
    plain_backward = compiled(plain, x, "raise{allow_empty},checkpoint{policy=none}")[1]
    again = lambda ops, op: sum(op in str(t) for t in ops)
    before = [n.target for n in plain_backward.graph.nodes if n.op == "call_function"]
    for ops in found.values():
        assert again(ops, "gelu.default") == again(before, "gelu.default") + 2
        extra = again(ops, "addmm") - again(before, "addmm")
        assert extra == 0 if kind == "policy" else extra >= 6


def nothing():
    return contextlib.nullcontext(), contextlib.nullcontext()


def test_a_context_of_another_kind_is_refused():
    class Net(nn.Module):
        def forward(self, x):
            return checkpoint(torch.sin, x, use_reentrant=False, context_fn=nothing).sum()

    x = torch.randn(3, requires_grad=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="create_selective_checkpoint_contexts"):
        torch.compile(Net(), backend="fuseline")(x)


# random graphs


class Random(nn.Module):
    """A random training graph: each step takes two earlier values."""

    def __init__(self, steps, repeats):
        super().__init__()
        self.steps, self.repeats = steps, repeats
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(6, 6) / 3) for _ in range(repeats * len(steps)))

    def forward(self, x):
        x = x * 1.0
        for r in range(self.repeats):
            values = [x]
            for i, (kind, a, b) in enumerate(self.steps):
                left, right = values[-1 - a % len(values)], values[-1 - b % len(values)]
                weight = self.weights[r * len(self.steps) + i]
                values.append(STEPS[kind](left, right, weight))
            x = torch.stack(values).sum(0)  # a draw that nobody reads is one that PyTorch's partition refuses
        return x.square().sum()


STEPS = (
    lambda a, b, w: torch.tanh(a @ w) + b,
    lambda a, b, w: F.dropout(a, 0.3) * torch.sigmoid(b) + w.sum(),
    lambda a, b, w: F.layer_norm(a + b, (6,)) @ w,
    lambda a, b, w: torch.softmax(a @ b.t() / 3, -1) @ (b @ w),
    lambda a, b, w: torch.cat((a[:, :3], b[:, 3:]), -1).relu() @ w,
    lambda a, b, w: (a * b).clamp(max=1.0).exp() + w[0],  # no infinities: NaN equals nothing, itself included
)
graphs = st.lists(
    st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=4
)


@settings(max_examples=6, deadline=None)
@given(graphs, st.integers(1, 3), st.sampled_from(CHOICES[:4]), st.sampled_from((0.5, 0.75)))
def test_random_training_graphs(steps, repeats, choice, share):
    traced = Traced(Random(steps, repeats), torch.randn(5, 6))
    theirs = uncheckpointed(traced)
    try:
        forward, backward, joint = traced.split(choice.replace("memory=0.6", f"memory={share}"))
    except UserError as refused:
        assert "the smallest that can be reached" in str(refused)
        return
    assert agree(traced.step(forward, backward), theirs)
    if "budget" in choice:
        step = joint.pipeline.passes[0]
        found = tape(traced.program())
        sizes = found.size_values({})
        everything = {s for i in found.forward for s in found.allocates[i]}
        from fuseline.passes.checkpointing.policies import choose

        problem = step.problem(traced.program())
        chosen = choose(problem, step.policy, step.limit(problem))
        limit = share * max(peak(execute(found, everything), sizes))
        assert max(peak(chosen.execution, sizes)) <= limit * 1.0001
