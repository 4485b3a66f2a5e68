"""The joint level: passes on forward and backward in one graph, which AOTAutograd hands over to be split in two.

A joint pass decides what becomes of each forward value by tags (`compat_joint.tag`); the split follows them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node

from .action import Observer
from .compat_joint import is_backward, is_tangent, merge_equal, split_as_written, split_by_tags, tag
from .errors import PassError
from .normalize import write_constants_down
from .pipeline import Pipeline
from .program import JOINT, Program
from .regions import has_regions, region_of, region_saves
from .report import Report

FUSED = "fused"
"""In `Program.state`: what runs the graph fuses pointwise operations into one another."""

Rewrite = Callable[[GraphModule, GraphModule, int], None]
"""What a joint pass does to forward and backward after the split; the number is that of the forward's results."""


class Joint:
    """Splits the joint graph of a training program as the joint passes of its pipeline decide.

    Args:
        fused: whether the graphs are compiled by something that fuses pointwise operations.
        report: of the passes before autograd; those of the joint level are added to it.
    """

    def __init__(
        self, pipeline: Pipeline, fused: bool, observers: Sequence[Observer], verification: str, report: Report
    ):
        self.pipeline, self.fused, self.observers, self.verification = pipeline, fused, observers, verification
        self.report = report
        self.done = False
        self.program: Program | None = None

    @property
    def key(self) -> str:
        """What tells this split from others in a cache."""
        return hashlib.sha256("|".join(["fuseline", *map(str, self.pipeline.joint)]).encode()).hexdigest()

    def wanted(self, program: Program) -> bool:
        """Whether the graph is split other than as eager would run it."""
        return bool(self.pipeline.joint) or has_regions(program.graph)

    def check(self) -> None:
        """Holds joint passes to having run.

        Raises:
            PassError: AOTAutograd found nothing to differentiate.
        """
        if self.pipeline.joint and not self.done:
            raise PassError(
                f"pass '{self.pipeline.joint[0].name}' found no backward: no result of the graph needs a gradient",
                remedy="compile the call that the loss is computed from, or leave the pass out",
            )

    def split(self, joint: GraphModule, inputs: Sequence[Any], **given: Any) -> tuple[GraphModule, GraphModule]:
        """The partition function of AOTAutograd."""
        self.done = True
        if not self.pipeline.joint:
            keep_regions(joint)
            return split_as_written(joint, inputs, **given)
        program = joint_program(joint, self.fused, given["num_fwd_outputs"])
        after, _ = self.pipeline.run(program, self.observers, self.verification, None, self.report)
        self.program = after
        forward, backward = split_by_tags(after.module, inputs, **given)
        for rewrite in after.module.meta.get("fuseline_after_split", ()):
            rewrite(forward, backward, given["num_fwd_outputs"])
        return forward, backward


def joint_program(joint: GraphModule, fused: bool = False, results: int | None = None) -> Program:
    """A joint graph as a program: primals and tangents are its inputs; its first `results` results are the forward's,
    the others gradients. Equal calls are merged."""
    merge_equal(joint)
    joint.meta["fuseline_forward_results"] = results
    placeholders = [n for n in joint.graph.nodes if n.op == "placeholder"]
    values = [v for n in placeholders for v in torch.utils._pytree.tree_leaves(n.meta.get("val"))]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()
    write_constants_down(joint)
    state = frozenset({JOINT, FUSED} if fused else {JOINT})
    return Program(joint, mode, list(range(len(placeholders))), {}, training=True, state=state)


def after_split(program: Program, rewrite: Rewrite) -> None:
    """Has a joint pass's rewrite run on forward and backward once they are apart."""
    known = program.module.meta.get("fuseline_after_split", ())
    program.module.meta["fuseline_after_split"] = (*known, rewrite)


def keep_regions(joint: GraphModule) -> None:
    """Tags the nodes of the user's own checkpointed regions, and no others."""
    for node in forward_nodes(joint):
        saved = region_saves(node)
        if saved is not None:
            tag(node, saved)
            node.meta["ac_graph_id"] = region_of(node)


def forward_nodes(joint: GraphModule) -> list[Node]:
    """The calls that the forward consists of, in order: what depends on no gradient and was not recorded in the
    backward."""
    behind: set[Node] = set()
    found: list[Node] = []
    for node in joint.graph.nodes:
        if is_tangent(node) or is_backward(node) or any(n in behind for n in node.all_input_nodes):
            behind.add(node)
        elif node.op == "call_function":
            found.append(node)
    return found
