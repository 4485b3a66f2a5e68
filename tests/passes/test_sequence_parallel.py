"""`sequence-parallel` at degrees that no test machine has: graphs of one rank under PyTorch's fake process group.

What a rank sends is counted from the graph and held against the closed form; which heads it computes, and where a
sequence goes through a reshape, are held against their definitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st

import fuseline
from fuseline.compiler.machine import MACHINES
from fuseline.passes.sequence import Families
from fuseline.passes.sequence.choice import LATENCY, Layout, Work, choose, layouts, predict
from fuseline.passes.sequence.collectives import Group
from fuseline.passes.sequence.heads import Heads
from fuseline.passes.sequence.placement import Axis, Shard, through_reshape
from fuseline.passes.sequence.volume import around, exchanged, sent
from tests.distributed.sequence_models import Decoder, batch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")


@pytest.fixture
def ranks() -> Iterator[Any]:
    """Starts a process group of that many ranks, of which this process is one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(world: int, rank: int = 0) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield start
    dist.destroy_process_group()


def cut(model: torch.nn.Module, length: int, pipeline: str = "sequence-parallel", **more: Any) -> Any:
    """The compilation of one rank."""
    seen: list[Any] = []
    torch.compiler.reset()
    run = torch.compile(model, backend="fuseline", options={"pipeline": pipeline, "record": seen.append})
    run(**batch(1, length), **more)
    return seen[0]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("world", "keys"), [(8, 2), (8, 8), (64, 2), (512, 8)])
def test_what_a_rank_sends(ranks: Any, world: int, keys: int) -> None:
    """Length and degree grow together: so many positions a rank, and so much to send, up to its own share of heads."""
    heads, block = max(8, world), 4
    ranks(world)
    program = cut(Decoder(heads=heads, keys=keys), block * world).program
    found = sent(program.graph)
    wanted = exchanged(batch=1, block=block, heads=heads, keys=keys, width=8, degree=world)
    assert found["all_to_all_single"] == wanted
    shapes = [tuple(n.meta["val"].shape) for n in program.graph.nodes if getattr(n.target, "_opname", "") == "linear"]
    assert all(shape[1] == block for shape in shapes)


def test_volume_is_constant(ranks: Any) -> None:
    """As DeepSpeed-Ulysses has it: elements sent by a rank in one attention, for heads that divide."""
    ranks(2)
    each = {p: exchanged(batch=1, block=1024, heads=512, keys=512, width=8, degree=p) for p in (8, 64, 512)}
    whole = 4 * 1024 * 512 * 8
    assert all(volume <= whole for volume in each.values())
    assert each[512] - each[8] < 0.13 * whole


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("world", "ring", "keys"), [(8, 2, 2), (64, 8, 8), (512, 64, 8)])
def test_what_a_rank_of_a_hybrid_sends(ranks: Any, world: int, ring: int, keys: int) -> None:
    """Heads among neighbours, keys and values around their groups."""
    ranks(world, world - 1)
    inner, block = world // ring, 4
    pipeline = f"raise,sequence-parallel{{kind=hybrid,ring={ring}}}"
    program = cut(Decoder(heads=max(8, inner), keys=keys), block * world, pipeline).program
    found, share = sent(program.graph), Heads(max(8, inner), keys, inner)
    assert found["all_to_all_single"] == exchanged(1, block, max(8, inner), keys, 8, inner)
    assert found["ring_attention"] == around(1, block * inner, share.local_keys, 8, ring)
    shapes = [tuple(n.meta["val"].shape) for n in program.graph.nodes if getattr(n.target, "_opname", "") == "linear"]
    assert all(shape[1] == block for shape in shapes)


@pytest.mark.parametrize(("degree", "zigzag", "length"), [(4, 0, 10), (4, 4, 13), (4, 2, 13), (6, 2, 30), (12, 4, 50)])
def test_every_position_is_held_once(degree: int, zigzag: int, length: int) -> None:
    """Blocks in order or in a zigzag of members of several ranks: taken apart and put together again."""
    axis = Families(degree, zigzag).of(length)
    blocks = [Group("none", degree, r).positions(axis, torch.device("cpu")) for r in range(degree)]
    held = torch.cat(blocks)
    assert all(len(b) == axis.block for b in blocks)
    assert torch.equal(held.sort().values, torch.arange(degree * axis.block)) and degree * axis.block >= length
    if zigzag:  # a causal mask gives every member the same number of pairs
        pairs = [int((p + 1).sum()) for p in held.view(zigzag, -1)]
        assert len(set(pairs)) == 1
    x = torch.randn(2, length, 3)
    parts = torch.stack([Group("none", degree, r).take(x, Shard(1, axis)) for r in range(degree)])
    group = Group("none", degree, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "all_gather", lambda self, part: parts.unflatten(2, (1, axis.block, 1)))
        assert torch.equal(group.gather(parts[0], Shard(1, axis)), x)


MACHINE = MACHINES["h100"]


def work(heads: int = 32, keys: int = 8, length: int = 131072) -> Work:
    return Work(1, length, heads, keys, 128, 2, True)


@pytest.mark.parametrize(
    ("one", "degree", "kind"),
    [
        (work(), 8, "ulysses"),  # all divides, one node
        (work(heads=1, keys=1), 8, "ring"),  # one head: all but one rank would compute it for nothing
        (work(heads=4, keys=4), 8, "hybrid"),
        (work(heads=9, keys=9), 4, "ring"),  # 12 heads would be computed for 9
        (work(length=256), 8, "ulysses"),  # short: a ring's launches count
    ],
)
def test_auto_by_cost(one: Work, degree: int, kind: str) -> None:
    assert choose([one], list(layouts(degree)), MACHINE).kind == kind


def test_between_nodes_the_exchange_of_heads_is_not_the_fastest() -> None:
    """Two nodes of 8: keys and values of 8 heads go around behind attention, 32 heads would be waited for."""
    taken = {k: predict(work(), k, MACHINE).total for k in layouts(16)}
    assert taken[Layout(8, 2)] < taken[Layout(16, 1)]


@pytest.mark.parametrize("degree", [8, 64, 512])
def test_predicted_seconds_are_the_closed_form(degree: int) -> None:
    one = work(heads=512, keys=512)
    lane = (MACHINE.link if degree <= 8 else MACHINE.network) * MACHINE.bandwidth_share
    wanted = 2 * (exchanged(1, one.length / degree, 512, 512, 128, degree) * 2 / lane + 2 * LATENCY)
    assert predict(one, Layout(degree, 1), MACHINE).exposed == pytest.approx(wanted)


@pytest.mark.slow
def test_an_attention_of_few_heads_goes_around_by_itself(ranks: Any) -> None:
    """`kind=auto` on one head of a long sequence; the same with a mask that nobody knows stays with heads."""
    ranks(8)
    names = lambda pipeline, **more: {
        getattr(n.target, "_opname", "")
        for n in cut(Decoder(heads=1, keys=1), 8192, pipeline, **more).program.graph.nodes
    }
    assert "ring_attention" in names("raise,sequence-parallel")
    unknown = torch.rand(8192, 8192) > 0.5
    assert "ring_attention" not in names("raise,sequence-parallel", mask=unknown)


def test_ring_without_a_hybrid(ranks: Any) -> None:
    ranks(8)
    with pytest.raises(Exception, match="ring=2 says how kind=hybrid shares the degree"):
        cut(Decoder(), 32, "raise,sequence-parallel{ring=2}")
    with pytest.raises(Exception, match="cannot share degree 8 between heads and a ring of 3") as caught:
        cut(Decoder(), 32, "raise,sequence-parallel{kind=hybrid,ring=3}")
    assert "try: ring=2 or 4" in str(caught.value)


@pytest.mark.slow
def test_parts_are_symbolic(ranks: Any) -> None:
    """`inputs=sharded`: the length of a part comes as a symbol at the first call already, and stands for a part of
    it in each linear and for the whole around attention."""
    ranks(4, 2)
    program = cut(Decoder(), 6, "sequence-parallel{inputs=sharded}").program
    ids = next(n for n in program.placeholders if "ids" in n.name and isinstance(n.meta["val"], torch.Tensor))
    length = ids.meta["val"].shape[1]
    shapes = {str(n.meta["val"].shape[1]) for n in program.graph.nodes if getattr(n.target, "_opname", "") == "linear"}
    assert isinstance(length, torch.SymInt) and shapes == {str(length)}
    attention = next(
        n for n in program.graph.nodes if getattr(n.target, "_opname", "") == "scaled_dot_product_attention"
    )
    assert attention.args[0].meta["val"].shape[2] == 4 * length


def test_graphs_of_ranks_differ_in_numbers_only(ranks: Any) -> None:
    from fuseline.compiler.structure import describe_value

    found = []
    for rank in (0, 6):
        if rank:
            dist.destroy_process_group()
        ranks(8, rank)
        graph = cut(Decoder(heads=9, keys=3), 19).program.graph
        found.append([(str(n.target) if n.op == "call_function" else n.op, describe_value(n.meta.get("val")))
                      for n in graph.nodes])  # fmt: skip
    assert found[0] == found[1]


def test_report_and_refusal(ranks: Any) -> None:
    ranks(4)
    report = cut(Decoder(), 12).report
    assert report["sequence-parallel"].matched == 1
    with pytest.raises(Exception, match="a sequence of 3 positions cannot be cut for 4 ranks"):
        cut(Decoder(), 3)


def test_no_process_group() -> None:
    with pytest.raises(Exception, match="needs a process group, and this process has none") as caught:
        cut(Decoder(), 12)
    assert "torchrun --nproc-per-node=N" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "sequence-parallel{degree=4,kind=ulysses,gradients=outside}",
        "sequence-parallel{mesh=sp,gather=sort|topk}",
        "sequence-parallel{kind=hybrid,ring=2,inputs=sharded}",
    ],
)
def test_text(text: str) -> None:
    assert str(fuseline.Pipeline(text)) == text
    assert fuseline.Pipeline("sequence-parallel{degree=auto}") == fuseline.Pipeline("sequence-parallel")


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(2, 16))
def test_every_query_reads_its_key(keys: int, groups: int, degree: int) -> None:
    heads = Heads(keys * groups, keys, degree)
    cpu = torch.device("cpu")
    key_order = heads.key_order(cpu)
    key_order = torch.arange(keys) if key_order is None else key_order
    for rank in range(degree):
        held = key_order[rank * heads.local_keys : (rank + 1) * heads.local_keys]
        mine = heads.queries_of(rank, cpu)
        places = heads.read_by(rank, cpu)
        if places is None:
            places = torch.arange(heads.local) // (heads.local // heads.local_keys)
        assert torch.equal(held[places], mine // groups)


@settings(deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=4), st.integers(0, 3), st.data())
def test_through_reshape(sizes: list[int], at: int, data: Any) -> None:
    """A block of positions, cut before the reshape or after it, holds the same elements."""
    at = min(at, len(sizes) - 1)
    sizes[at] = 4
    order = list(range(len(sizes) + 1))
    cuts = sorted(data.draw(st.sets(st.sampled_from(order), max_size=len(order))) | {0, len(sizes)})
    after = [int(torch.tensor(sizes[a:b]).prod()) for a, b in zip(cuts, cuts[1:])]
    axis = Axis(4, 2, 2, True)
    shard = through_reshape(Shard(at, axis), sizes, after)
    assert shard is not None
    x = torch.arange(int(torch.tensor(sizes).prod())).view(sizes)
    mine = x.narrow(at, 2, 2)
    whole = x.view(after).unflatten(shard.dim, (shard.outer, 4, shard.inner))
    assert torch.equal(whole.narrow(shard.dim + 1, 2, 2).reshape(shard.shape(after)), mine.reshape(shard.shape(after)))
    back = through_reshape(shard, after, sizes)
    assert back is not None and (back.dim, back.outer, back.inner) == (at, 1, 1)


def test_reshape_that_takes_the_sequence_apart() -> None:
    axis = Axis(6, 3, 2, True)
    assert through_reshape(Shard(1, axis), [2, 6, 8], [2, 3, 2, 8]) is None
    assert through_reshape(Shard(1, axis), [2, 6, 8], [12, 8]) == Shard(0, axis, 2, 1)
