"""TEAL's allocation: in each block, the product whose next step costs the block's results least goes first.

Source: TEAL (Liu et al., 2025), the block-wise greedy search. A block is the part of the graph from its first sparse
product up to the next block's; its results are what is read after that. Blocks are judged by themselves, on what the
dense model gives them, and all keep the same share of their bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ...compiler.errors import UserError
from ...compiler.order import touches_written
from ...compiler.program import Program
from ...compiler.progress import steps
from .budgets import Shares
from .groups import Group
from .samples import Sample
from .trial import Mask, Masked

STEP = 0.05
"""The share of a block's bytes that one step takes away."""

LEAST = 0.02
"""No product keeps less of its channels."""


def greedy(program: Program, found: Mapping[Group, Sample], data: Sequence[Sequence[Any]], share: float) -> Shares:
    """The share of each group.

    Raises:
        UserError: the program writes to its inputs, so that parts of it cannot be run again.
    """
    blocks: dict[str, list[Group]] = {}
    for group in found:
        blocks.setdefault(group.block, []).append(group)
    segments = Segments(program, list(blocks.values()), data)
    shares = dict.fromkeys(found, 1.0)
    for groups in steps(segments, "dividing block by block", total=len(blocks)):
        total = sum(group.bytes for group in groups)
        left = (1 - share) * total
        while left > 1e-6 * total:
            step = min(STEP * total, left)
            able = [g for g in groups if shares[g] - step / g.bytes >= LEAST]
            if not able:  # a small block: what is left falls on all alike
                low = sum(shares[g] * g.bytes for g in groups)
                shares |= {g: shares[g] * (low - left) / low for g in groups}
                break
            tried = {}
            for group in able:
                shares_then = shares | {group: shares[group] - step / group.bytes}
                masks = {g: Mask(found[g].threshold(shares_then[g])) for g in groups if shares_then[g] < 1}
                tried[group] = segments.error(masks)
            best = min(tried, key=lambda g: tried[g])
            shares[best] -= step / best.bytes
            left -= step
    return shares


class Segments:
    """The blocks of a program in turn, each ready to be run with masks on what the dense program gives it."""

    def __init__(self, program: Program, blocks: Sequence[Sequence[Group]], data: Sequence[Sequence[Any]]):
        nodes = list(program.graph.nodes)
        self.place = {node: i for i, node in enumerate(nodes)}
        self.blocks, self.nodes, self.data = blocks, nodes, data
        self.trial = Masked(program)
        self.last_use = {node: max((self.place[user] for user in node.users), default=-1) for node in nodes}
        self.first, self.end = 0, 0
        self.given: list[dict[Node, Any]] = []
        self.wanted: list[dict[Node, torch.Tensor]] = []
        for node in nodes:
            if touches_written(node):
                raise UserError(
                    "budgets=greedy runs parts of the model again and again, and this one writes to a cache",
                    [f"at {node.name}"],
                    "calibrate with use_cache=False, or choose another way: budgets=sensitivity",
                )

    @torch.no_grad()
    def __iter__(self) -> Any:
        starts = [min(self.place[site.node] for group in block for site in group.sites) for block in self.blocks]
        stop = self._behind(starts[-1], self.blocks[-1])
        envs: list[dict[Node, Any]] = [{} for _ in self.data]
        done = 0
        for block, start, end in zip(self.blocks, starts, [*starts[1:], stop], strict=True):
            for flat, env in zip(self.data, envs, strict=True):
                self._run(flat, env, done, start, {})
            self.first, self.end, self.given = start, end, [dict(env) for env in envs]
            for flat, env in zip(self.data, envs, strict=True):
                self._run(flat, env, start, end, {})
            crossing = [n for n in self.nodes[start:end] if self.last_use[n] >= end]
            self.wanted = [{n: e[n] for n in crossing if isinstance(e[n], torch.Tensor)} for e in envs]
            yield block
            for env in envs:
                for node in [n for n in env if self.last_use[n] < end]:
                    del env[node]
            done = end

    @torch.no_grad()
    def error(self, masks: Mapping[Group, Mask]) -> float:
        """Σ|Δ|² / Σ|result|² of what the block gives, over all calls; the mean over its results."""
        gaps: dict[Node, list[float]] = {}
        for flat, given, wanted in zip(self.data, self.given, self.wanted, strict=True):
            env = dict(given)
            self._run(flat, env, self.first, self.end, masks)
            for node, value in wanted.items():
                if value.is_floating_point():
                    pair = gaps.setdefault(node, [0.0, 0.0])
                    pair[0] += float((env[node].float() - value.float()).square().sum())
                    pair[1] += float(value.float().square().sum())
        return sum(gap / size for gap, size in gaps.values() if size) / max(1, len(gaps))

    def _run(
        self, flat: Sequence[Any], env: dict[Node, Any], first: int, end: int, masks: Mapping[Group, Mask]
    ) -> None:
        """Runs the nodes of these places; results go into `env`."""
        inputs = dict(zip(self.trial.program.placeholders, self.trial.program.arguments, strict=True))
        self.trial.set(masks)
        self.trial.flat, self.trial.env = flat, env
        for node in self.nodes[first:end]:
            if node.op != "output":
                env[node] = flat[inputs[node]] if node in inputs else self.trial.run_node(node)

    def _behind(self, start: int, block: Sequence[Group]) -> int:
        """Where the last block ends: before the first product behind its own (a head), or at the graph's end."""
        own = {site.node for group in block for site in group.sites}
        last = max(self.place[node] for node in own)
        for node in self.nodes[last + 1 :]:
            if getattr(node.target, "_opname", "") in ("linear", "addmm", "mm", "matmul") or node.op == "output":
                return self.place[node]
        return len(self.nodes)
