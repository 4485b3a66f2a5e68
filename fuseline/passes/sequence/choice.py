"""Which kind of `sequence-parallel` is predicted to be fastest: attention and its exchanges in closed form.

A *layout* shares a degree P between heads and a ring, P = heads · ring. For batch B, S positions, query heads H and key
heads K of width D, with h = ⌈H/heads⌉ query heads a rank and k key heads that they read (`heads.py`), one attention is

    compute     4·B·S²·h·D / ring FLOPs forward, half of that under a causal mask; backward 2.5 times as many
    exchanges   (heads − 1)·B·S/P·D·2(h + k) elements, forward and again backward; attention waits for them
    ring        (ring − 1) sends of 2·B·S/ring·k·D elements, each behind the attention of one step; backward the same,
                and `ring` more of the gradients that travel along, in float32 at least, which nothing hides

so heads are exchanged where they divide and links are fast; a ring pays where heads are fewer than ranks or are padded,
and between nodes. Sources: DeepSpeed-Ulysses (Jacobs et al., 2023), section 3.2; USP (Fang and Zhao, 2024) for layouts
of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ...compiler.compat import size_hint
from ...compiler.machine import Machine
from .heads import Heads

LATENCY = 1e-5
"""Seconds before the first byte of a collective arrives."""
STEP_KERNELS = 8
"""What is launched in a step of a ring: attention, and the joining of its result with what there is."""
MARGIN = 1.2
"""How much faster than an exchange of heads another kind must be predicted to be before `auto` takes it."""
BACKWARD = 2.5


@dataclass(frozen=True)
class Layout:
    """`heads` neighbouring ranks exchange heads for positions, `ring` such groups pass keys and values around."""

    heads: int
    ring: int

    @property
    def degree(self) -> int:
        return self.heads * self.ring

    @property
    def kind(self) -> str:
        if self.ring == 1:
            return "ulysses"
        return "ring" if self.heads == 1 else "hybrid"

    @property
    def options(self) -> str:
        """As a pass's options: `degree=8,kind=hybrid,ring=2`."""
        return f"degree={self.degree},kind={self.kind}" + (f",ring={self.ring}" if self.kind == "hybrid" else "")


@dataclass(frozen=True)
class Work:
    """The sizes of one attention; itemsize: bytes of an element."""

    batch: int
    length: int
    heads: int
    keys: int
    width: int
    itemsize: int
    causal: bool

    @staticmethod
    def of(node: Node, causal: bool) -> Work:
        """From a node whose queries are [B, H, S, D]."""
        q, k = (n.meta["val"] for n in node.args[:2])  # type: ignore[union-attr]
        batch, heads, length, width = (size_hint(s) for s in q.shape)
        return Work(batch, length, heads, size_hint(k.shape[1]), width, q.dtype.itemsize, causal)


@dataclass(frozen=True)
class Seconds:
    """Forward and backward of one attention on a rank: `compute`, and what of the exchanges nothing hides."""

    compute: float
    exposed: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed


def layouts(degree: int) -> Iterator[Layout]:
    """All layouts of a degree; the exchange of heads alone first, the ring alone last."""
    for ring in range(1, degree + 1):
        if degree % ring == 0:
            yield Layout(degree // ring, ring)


def predict(work: Work, layout: Layout, machine: Machine) -> Seconds:
    """What one attention takes a rank, forward and backward."""
    share = Heads(work.heads, work.keys, layout.heads)
    h, k = share.local, share.local_keys
    rate = machine.flops_16 if work.itemsize <= 2 else machine.flops_32
    flops = 4 * work.batch * work.length**2 * h * work.width / layout.ring * (0.5 if work.causal else 1.0)
    forward = flops / (rate * machine.attention_share)
    exposed = 0.0
    if layout.heads > 1:
        rows = work.batch * work.length / layout.degree * work.width * work.itemsize
        sent = (layout.heads - 1) * rows * 2 * (h + k)
        exposed += 2 * (sent / _lane(machine, layout.heads) + 2 * LATENCY)
    if layout.ring > 1:
        elements = 2 * work.batch * work.length / layout.ring * k * work.width
        lane = _lane(machine, layout.degree)
        send = elements * work.itemsize / lane + LATENCY
        for compute in (forward, BACKWARD * forward):
            exposed += (layout.ring - 1) * max(0.0, send - compute / layout.ring)
            exposed += layout.ring * STEP_KERNELS * machine.launch
        exposed += layout.ring * (elements * max(4, work.itemsize) / lane + LATENCY)
    return Seconds((1 + BACKWARD) * forward, exposed)


def choose(works: Sequence[Work], candidates: Sequence[Layout], machine: Machine) -> Layout:
    """The layout that is predicted to take least; the first candidate unless another is faster by more than MARGIN."""
    taken = {layout: sum(predict(work, layout, machine).total for work in works) for layout in candidates}
    best = min(taken, key=lambda layout: taken[layout])
    return best if taken[best] * MARGIN < taken[candidates[0]] else candidates[0]


def _lane(machine: Machine, ranks: int) -> float:
    """Bytes a second that a rank sends within a group of that many neighbours."""
    return machine.lane(ranks) * machine.bandwidth_share


def device_of(nodes: Sequence[Node]) -> torch.device:
    """The device that the attentions run on."""
    found = next((n.meta["val"].device for n in nodes), torch.device("cpu"))
    return torch.device(found)
