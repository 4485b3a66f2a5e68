"""Process groups of `torch.distributed`, found and never started: which ranks share a sequence."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from . import compat, compat_distributed
from .errors import UserError

LAUNCH = "torchrun --nproc-per-node=N script.py, with torch.distributed.init_process_group() in the script"
PATIENCE = datetime.timedelta(minutes=5)
_compared: Counter[str] = Counter()
_made: dict[tuple[Any, int], list[str]] = {}  # by the job's process group: a job may leave one and start another
_shared: dict[tuple[Any, str, int], tuple[Ranks, Ranks]] = {}


@dataclass(frozen=True)
class Ranks:
    """A process group by name, its size, and this process's place in it; `world`: how many processes there are."""

    name: str
    size: int
    rank: int
    world: int


def find(size: int | None, mesh: str | None, what: str) -> Ranks:
    """The group of `size` ranks that this process belongs to; None takes all there are.

    Args:
        mesh: a dimension of a DeviceMesh that the program has made, by its name.
        what: who asks, for messages.

    Raises:
        UserError: there is no process group, no such dimension, or the sizes do not fit.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise UserError(f"{what} needs a process group, and this process has none", remedy=LAUNCH)
    world = dist.get_world_size()
    if mesh is not None:
        found = compat.mesh_groups()
        if mesh not in found:
            known = ", ".join(sorted(found)) or "no DeviceMesh has named dimensions"
            raise UserError(
                f"there is no mesh dimension '{mesh}' ({known})",
                remedy=f'init_device_mesh(device, shape, mesh_dim_names=(…, "{mesh}")) before the first call',
            )
        name, members, rank = found[mesh]
        if size is not None and size != members:
            raise UserError(
                f"{what} asks for degree {size}, and the mesh dimension '{mesh}' has {members} ranks",
                remedy=f"degree=auto or degree={members}",
            )
        return Ranks(name, members, rank, world)
    size = world if size is None else size
    if size < 1 or world % size:
        divisors = [str(d) for d in range(1, world + 1) if world % d == 0]
        raise UserError(
            f"{what} of degree {size} does not fit {world} processes: the degree has to divide their number",
            remedy=f"degree={' or '.join(divisors)}, or start another number of processes",
        )
    if size == world:
        return Ranks(compat.group_name(dist.group.WORLD), size, dist.get_rank(), world)
    return Ranks(_neighbours(size, world), size, dist.get_rank() % size, world)


def _neighbours(size: int, world: int) -> str:
    """The name of the group of `size` neighbouring ranks; every process makes all of them, once."""
    key = (dist.group.WORLD, size)
    if key not in _made:
        with compat.real_tensors():
            groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world, size)]
        _made[key] = [compat.group_name(g) if g is not None else "" for g in groups]
    return _made[key][dist.get_rank() // size]


def split(ranks: Ranks, inner: int) -> tuple[Ranks, Ranks]:
    """The groups of `inner` neighbours among these ranks, and those of the ranks in the same place of each: this
    process's of either kind. Only their members make them."""
    key = (dist.group.WORLD, ranks.name, inner)
    if key not in _shared:
        members = compat_distributed.ranks_of(ranks.name)
        member, place = divmod(ranks.rank, inner)
        with compat.real_tensors():
            near = dist.new_group(members[member * inner : (member + 1) * inner], use_local_synchronization=True)
            far = dist.new_group(members[place::inner], use_local_synchronization=True)
        names = [compat.group_name(g) for g in (near, far)]
        _shared[key] = (Ranks(names[0], inner, place, ranks.world),
                        Ranks(names[1], ranks.size // inner, member, ranks.world))  # fmt: skip
    return _shared[key]


def agree(ranks: Ranks, facts: str, what: str, patience: datetime.timedelta | None = None) -> None:
    """Holds what this process is about to compile against what the others of its group do; they wait for one another.

    Args:
        facts: a text that has to be the same on all.
        patience: how long to wait; five minutes, or as long as the process group waits where that is less.

    Raises:
        UserError: with both texts, where they differ; or naming the rank that did not come, which went on with a graph
            that it had.
    """
    store = compat.shared_store()
    if store is None:
        return
    patience = patience or min(PATIENCE, compat_distributed.default_timeout() or PATIENCE)
    _compared[ranks.name] += 1
    number = _compared[ranks.name]
    key = lambda rank: f"fuseline/{ranks.name}/{number}/{rank}"
    store.set(key(ranks.rank), facts)
    for other in range(ranks.size):
        if other == ranks.rank:
            continue
        try:
            store.wait([key(other)], patience)
        except (RuntimeError, dist.DistStoreError) as error:
            raise UserError(
                f"{what}: rank {other} of the group did not compile graph {number} within {patience}",
                ["it runs a graph that it had, or it has ended: batches of different lengths do that"],
                "give every rank of a sequence the same batch",
            ) from error
        theirs = store.get(key(other)).decode()
        if theirs != facts:
            raise UserError(
                f"{what}: the ranks that share a sequence compile different graphs",
                [f"rank {ranks.rank}: {facts}", f"rank {other}: {theirs}"],
                "give every rank of a sequence the same batch, and the same code",
            )


def named(name: str) -> Ranks:
    """The group of that name, as functional collectives carry it; of one rank where this process does not know it."""
    size, rank = compat_distributed.place_in(name)
    return Ranks(name, size, rank, dist.get_world_size() if size > 1 else 1)


def follow(ranks: Ranks, said: str, what: str, patience: datetime.timedelta = PATIENCE) -> str:
    """What the first rank of a group says, where this process says `said`.

    Raises:
        UserError: the first rank said nothing in time, as one that went on with a graph that it had.
    """
    store = compat.shared_store() if ranks.size > 1 else None
    if store is None:
        return said
    _compared[ranks.name] += 1
    key = f"fuseline/{ranks.name}/{_compared[ranks.name]}/first"
    if ranks.rank == 0:
        store.set(key, said)
        return said
    try:
        store.wait([key], patience)
    except (RuntimeError, dist.DistStoreError) as error:
        raise UserError(
            f"{what}: the first rank of the group compiled no graph {_compared[ranks.name]} within {patience}",
            ["it runs a graph that it had, or it has ended: batches of different lengths do that"],
            "give every rank of a group batches of the same sizes",
        ) from error
    return str(store.get(key).decode())
