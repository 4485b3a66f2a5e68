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
from hypothesis import given, strategies as st

import fuseline
from fuseline.passes.sequence.heads import Heads
from fuseline.passes.sequence.placement import Axis, Shard, through_reshape
from fuseline.passes.sequence.volume import exchanged, sent
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


def cut(model: torch.nn.Module, length: int, pipeline: str = "sequence-parallel") -> Any:
    """The compilation of one rank."""
    seen: list[Any] = []
    torch.compiler.reset()
    run = torch.compile(model, backend="fuseline", options={"pipeline": pipeline, "record": seen.append})
    run(**batch(1, length))
    return seen[0]


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
    ["sequence-parallel{degree=4,kind=ulysses,gradients=outside}", "sequence-parallel{mesh=sp,gather=sort|topk}"],
)
def test_text(text: str) -> None:
    assert str(fuseline.Pipeline(text)) == text
    assert fuseline.Pipeline("sequence-parallel{degree=auto}") == fuseline.Pipeline("sequence-parallel")


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
