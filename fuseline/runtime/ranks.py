"""Which rank keeps the others waiting, in which collective, and at which line: told when a collective fails.

PyTorch knows that a collective failed or took longer than its process group allows, not whom it waited for. So each
process notes which of its compiled graphs runs (the process group's sequence number then tells how many of the graph's
collectives it has begun) and tells the others once a second, through the store in which the job's processes met. When a
collective fails, a process reads what the others said last: one that says nothing any more has ended, one that is
somewhere else has gone another way.

Where a process makes no progress for a while, its notes are read without waiting for an error, and a rank that has
fallen silent is logged: with NCCL a collective fails outside of Python, and PyTorch's watchdog ends the process.

Nothing is done in between but that: no collective waits for another process, and graphs run as they are.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import Graph, Node

from ..compiler import compat, compat_distributed
from ..compiler.errors import FuselineError
from ..compiler.provenance import source_line

log = logging.getLogger("fuseline")
BEAT = 1.0
"""Seconds between two notes of a process."""
SILENT = 15.0
"""Seconds without a note after which a process has ended; a busy machine may take some to run a thread. Whether a
process of the same machine is there is asked of the system."""
STILL = 10.0
"""Seconds without progress after which a process reads the others' notes."""
_EXCHANGES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
_FAILURE = re.compile(r"gloo|nccl|connection (closed|reset)|timed out|socket|store", re.IGNORECASE)


class RanksError(FuselineError):
    """A collective that other ranks did not come to."""


@dataclass(frozen=True)
class Exchange:
    """A collective of a graph: its name, the user's line, its group, and how many the group counts it as."""

    name: str
    line: str
    group: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.name} at {self.line}"


@dataclass
class Running:
    """A graph that runs: since when, on which sizes, and its groups' sequence numbers when it began."""

    title: str
    exchanges: tuple[Exchange, ...]
    begun: dict[str, int]
    sizes: tuple[int, ...]

    def position(self) -> tuple[int, Exchange | None]:
        """How many of the collectives were begun, and the last of these."""
        number, last = 0, None
        left = {group: compat_distributed.sequence_number(group) - n for group, n in self.begun.items()}
        for i, exchange in enumerate(self.exchanges, 1):
            if left.get(exchange.group, 0) <= 0:
                continue
            left[exchange.group] -= exchange.count
            number, last = i, exchange
        return number, last

    def __str__(self) -> str:
        number, last = self.position()
        place = f"collective {number} of {len(self.exchanges)}, {last}" if last else "before its first collective"
        return f"{self.title}{f' for sizes {self.sizes}' if self.sizes else ''}: {place}"


@dataclass
class Notes:
    """What this process tells the others."""

    running: list[Running] = field(default_factory=list)
    before: str = "nothing yet"
    since: float = field(default_factory=time.monotonic)
    failed: str | None = None
    done: bool = False

    def place(self) -> str:
        if self.running:
            return str(self.running[-1])
        return f"outside of compiled graphs for {time.monotonic() - self.since:.0f} s, last in {self.before}"


_notes = Notes()
_pulse: Pulse | None = None


class Pulse(threading.Thread):
    """Tells the others, once a second, where this process is."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        super().__init__(name="fuseline-ranks", daemon=True)
        self.origin = store
        self.store = store.clone() if hasattr(store, "clone") else store  # a wait in the main thread holds that one up
        self.rank, self.world, self.beat = rank, world, 0
        self.at: tuple[Any, ...] = ()
        self.since = time.monotonic()
        self.heard: dict[int, tuple[str, float]] = {}
        self.host = socket.gethostname()
        self.told: set[int] = set()

    def run(self) -> None:
        while True:
            try:
                self.tell()
                self.look()
            except Exception:  # the store is gone, or the group: whoever waits finds that out
                return
            time.sleep(BEAT)

    def tell(self) -> None:
        self.beat += 1
        note = {
            "beat": f"{id(self)}/{self.beat}",
            "place": _notes.place(),
            "failed": _notes.failed,
            "done": _notes.done,
            "process": [self.host, os.getpid()],
        }
        self.store.set(_key(self.rank), json.dumps(note))

    def look(self) -> None:
        """Logs a rank that fell silent while this process makes no progress."""
        now = time.monotonic()
        at = (_notes.since, *((id(r), r.position()[0]) for r in list(_notes.running)))
        if at != self.at:
            self.at, self.since = at, now
            self.heard.clear()
        if now - self.since < STILL:
            return
        for rank, note in self.others().items():
            beat, since = self.heard.get(rank, ("", now))
            self.heard[rank] = (note["beat"], since if beat == note["beat"] else now)
            silent = now - self.heard[rank][1]
            if rank in self.told or note["failed"] or note["done"]:
                continue
            state = self.state(note)
            if state == "Z" or silent >= (4 * SILENT if state in ("R", "S", "D") else SILENT):  # a busy machine is slow
                self.told.add(rank)
                log.error("rank %d has said nothing for %.0f s, last: %s; rank %d waits: %s",
                          rank, silent, note["place"], self.rank, _notes.place())  # fmt: skip

    def state(self, note: dict[str, Any]) -> str:
        """What the system says of another process of this machine: R, S, … where it goes on, T where it was stopped,
        Z where it has ended, and "" of one of another machine or where nothing is known."""
        host, pid = note["process"]
        if host != self.host:
            return ""
        try:
            os.kill(pid, 0)
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return "Z"
        except OSError:
            return ""

    def is_gone(self, note: dict[str, Any]) -> bool:
        """Whether a process of this machine has ended, for sure."""
        return self.state(note) == "Z"

    def others(self) -> dict[int, dict[str, Any]]:
        """The last note of every other process that wrote one."""
        ranks = [r for r in range(self.world) if r != self.rank and self.store.check([_key(r)])]
        return {r: json.loads(self.store.get(_key(r))) for r in ranks}


def _key(rank: int) -> str:
    return f"fuseline/ranks/{rank}"


def exchanges(graph: Graph) -> tuple[Exchange, ...]:
    """The collectives of a graph, in order."""
    found = []
    for node in graph.nodes:
        name = getattr(node.target, "_opname", "")
        if name in _EXCHANGES and "c10d_functional" in node.target.namespace:
            found.append(Exchange(name, _line(node), str(node.args[-1])))
        elif name in ("ring_attention", "ring_attention_backward"):
            *_, degree, group = node.args
            sends = degree - 1 if name == "ring_attention" else 2 * degree - 1
            found.append(Exchange(name, _line(node), str(group), sends))
    return tuple(found)


def _line(node: Node) -> str:
    own = source_line(node)
    if own is None:  # the gradient of a parameter, summed: named by what it is the gradient of
        own = next((line for n in node.all_input_nodes if (line := source_line(n))), None)
    return own or "an unknown line"


def watched(graph: Graph, run: Callable[..., Any], title: str) -> Callable[..., Any]:
    """`run`, a graph's callable, whose failing collectives are explained; as it is without any, or in one process."""
    found = exchanges(graph)
    store = compat.shared_store() if found else None
    if store is None:
        return run
    groups = {e.group for e in found}

    def watching(*args: Any) -> Any:
        _start(store)
        flat = args[0] if len(args) == 1 and isinstance(args[0], list) else args
        sizes = tuple(a for a in flat if isinstance(a, int) and not isinstance(a, bool))
        here = Running(title, found, {g: compat_distributed.sequence_number(g) for g in groups}, sizes)
        _notes.running.append(here)
        try:
            return run(*args)
        except RuntimeError as error:
            if isinstance(error, FuselineError) or not _FAILURE.search(str(error)):
                raise
            raise explained(here, error) from error
        finally:
            _notes.running.remove(here)
            _notes.before, _notes.since = title, time.monotonic()

    return watching


def _start(store: Any) -> None:
    global _pulse
    if _pulse is None or _pulse.origin is not store:  # a job may leave one process group and start another
        import torch.distributed as dist

        _pulse = Pulse(store, dist.get_rank(), dist.get_world_size())
        _pulse.start()
        atexit.register(_leave, _pulse)


def _leave(pulse: Pulse) -> None:
    """A process that ends as it should is not missed."""
    _notes.done = True
    with contextlib.suppress(Exception):  # the store may be gone before us
        pulse.tell()


def explained(here: Running, error: Exception) -> RanksError:
    """What a failed collective says, once it is known who still tells where it is: some seconds later."""
    assert _pulse is not None
    _notes.failed = str(here)
    said = str(error).strip().splitlines()[0][:200]
    log.error("rank %d: a collective failed in %s: %s", _pulse.rank, here, said)
    try:
        _pulse.tell()
        before = _pulse.others()
        after, until = before, time.monotonic() + SILENT
        while time.monotonic() < until and not all(_known(_pulse, before[r], note) for r, note in after.items()):
            time.sleep(BEAT)
            after = _pulse.others()
            before = {**after, **before}
        for r, note in after.items():
            if _pulse.is_gone(note):
                note["done"], before[r] = True, note
    except Exception as gone:
        return RanksError(
            f"rank {_pulse.rank}: a collective failed in {here}",
            [said, f"and the store in which the ranks met is gone ({type(gone).__name__}): the process that keeps it, "
             "rank 0 or its launcher, has ended"],
            "look for the first error in that process's output",
        )  # fmt: skip
    return judged(_pulse.rank, here, said, before, after, _pulse.world)


def _known(pulse: Pulse, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether it is known of another process that it goes on, failed too, or has ended."""
    return before["beat"] != after["beat"] or bool(after["failed"] or after["done"]) or pulse.is_gone(after)


def judged(
    rank: int, here: Running, said: str, before: dict[int, Any], after: dict[int, Any], world: int
) -> RanksError:
    """Who is to blame, by the notes of the other ranks at the failure and some seconds later; of one that has ended the
    note is `done`."""
    _, last = here.position()
    silent = [r for r in after if r in before and before[r]["beat"] == after[r]["beat"]]
    silent = [r for r in silent if not after[r].get("done")] + [r for r in after if after[r].get("done")]
    ended = [r for r in silent if not after[r]["failed"]]
    never = [r for r in range(world) if r != rank and r not in after]
    places = [f"rank {r}: {note['failed'] or note['place']}{', silent since' if r in silent else ''}"
              for r, note in sorted(after.items())]  # fmt: skip
    facts = [f"rank {rank}: {here}", *places, said]
    if ended:
        names = _names(ended)
        what = "ended" if all(after[r].get("done") for r in ended) else "ended or hangs"
        return RanksError(
            f"{names} {what}; rank {rank} waited in {last}", facts, f"look for the first error in the output of {names}"
        )
    if never:
        names = _names(never)
        return RanksError(
            f"{names} ran no compiled graph with collectives; rank {rank} waited in {last}", facts,
            "give every rank of a sequence the same batches and the same code",
        )  # fmt: skip
    elsewhere = [r for r, note in after.items() if not note["failed"] and note["place"] != str(here)]
    elsewhere = elsewhere or [r for r, note in after.items() if (note["failed"] or note["place"]) != str(here)]
    if elsewhere:
        return RanksError(
            f"{_names(elsewhere)} went another way; rank {rank} waited in {last}", facts,
            "give every rank of a sequence the same batch, and let every rank call the model as often",
        )  # fmt: skip
    return RanksError(f"a collective failed on every rank: {last}", facts, "the network, or another process group")


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, sorted(ranks)))}"
