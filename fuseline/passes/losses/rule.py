"""linear → cross_entropy → `fuseline.linear_cross_entropy`; the page of the pass says what lies between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ...compiler.deferred import DEFERS, tail_of
from ...compiler.ops import linear_cross_entropy
from ...compiler.pattern import Match
from ...compiler.program import Program
from ...compiler.rewriter import Builder
from ...compiler.rule import Rule
from ...compiler.traits import arguments
from ..raising.modes import Modes
from ..raising.nodes import op_name, shape_text, value
from .chain import Chain, follow, rows_of

aten = torch.ops.aten
LOSSES = ("cross_entropy_loss", "nll_loss", "nll_loss_nd")


class LinearCrossEntropy(Rule):
    """One loss.

    Args:
        defers: whether logits that the caller gets may be computed when they are read.
        least: the smallest vocabulary that is taken.
        chunk: rows at a time, 0 for what the op finds right.
    """

    def __init__(self, program: Program, defers: bool, least: int, chunk: int):
        self._defers, self._least, self._chunk = defers, least, chunk
        self._modes = Modes(program.graph, program.training)
        self._training, self._free = program.training, DEFERS in program.state

    def matches(self, program: Program) -> Iterator[Match]:
        for node in list(program.graph.nodes):
            if node.op != "call_function" or op_name(node) not in LOSSES or node._erased:
                continue
            given = arguments(node)
            logits, between = given["self"], []
            if op_name(node) != "cross_entropy_loss":
                if op_name(logits) != "log_softmax" or arguments(logits)["dim"] not in _class_dims(value(logits)):
                    continue
                between, logits = [logits], logits.args[0]
            inner, turned = _rows_last(logits)
            reader = turned or (between[0] if between else node)
            chain = follow(inner, reader)
            if value(logits).dim() > 2 and turned is None:
                chain = "the classes lie in dimension 1, and no transposition puts a linear layer's there"
            elif turned is not None and len(turned.users) > 1:
                chain = "the logits are read by more than the loss"
            if isinstance(chain, str) and not _from_linear(logits):
                continue
            found = [] if isinstance(chain, str) else chain.nodes
            nodes = (node, *between, *([turned] if turned else []), *found)
            yield Match(node, {"chain": chain, "given": given, "between": between}, nodes)

    def refuse(self, m: Match) -> str | None:
        chain: Chain | str = m.chain
        if isinstance(chain, str):
            return chain
        if any(len(n.users) > 1 for n in m.between):
            return "the logarithms of the probabilities are read by more than the loss"
        target, classes = value(m.given["target"]), value(chain.linear)
        if value(m.given["self"]).dim() < 2:
            return "the loss is of one token without a batch dimension"
        if target.is_floating_point():
            return f"the targets are probabilities {shape_text(m.given['target'])}, not classes"
        if not isinstance(classes.shape[-1], int) or classes.shape[-1] < self._least:
            size = classes.shape[-1]
            return f"the vocabulary has {size} tokens: below {self._least} the logits are stored at a low cost"
        if m.given.get("label_smoothing") and m.given["weight"] is not None:
            return "label smoothing and class weights together"
        if not isinstance(m.given["ignore_index"], int):
            return "ignore_index differs from call to call"
        if value(arguments(chain.linear)["weight"] if _is_linear(chain) else chain.linear.args[1]).dim() != 2:  # type: ignore[arg-type]
            return "the layer's weight is no matrix"
        return self._refuse_returned(chain) or self._modes.refuse(m, casts=False)

    def _refuse_returned(self, chain: Chain) -> str | None:
        if not chain.returned:
            return None
        if not self._training:
            return "the logits are returned to the caller"
        if not self._defers:
            return "the logits are returned to the caller, and kept: logits=deferred computes them when they are read"
        if not self._free:
            return "the logits are read behind a graph break, or returned by a graph that the backend did not get"
        if not self._modes.records(chain.linear):
            return "the logits are returned to the caller, and computed without gradients"
        if any(tail_of(node) is None for node in chain.returned):
            return "the logits are returned, and are no linear layer of a parameter followed by numbers and casts"
        return None

    def after(self, m: Match, new: Builder) -> Node:
        given: dict[str, Any] = m.given
        chain: Chain = m.chain
        x, weight, bias = rows_of(chain, new)
        x = x if value(x).dim() == 2 else new(aten.reshape.default, x, [-1, value(x).shape[-1]])
        target = given["target"]
        labels = target if value(target).dim() == 1 else new(aten.reshape.default, target, [-1])
        made, dtype = value(m.root).dtype, value(x).dtype
        loss = new(
            linear_cross_entropy, x, weight, bias, labels, given["weight"], given["reduction"], given["ignore_index"],
            float(given.get("label_smoothing") or 0.0), chain.scale, chain.softcap,
            None if made == dtype else made, self._chunk,
        )  # fmt: skip
        per_token = given["reduction"] == 0 and value(target).dim() != 1
        return new(aten.view_as.default, loss, target) if per_token else loss


def _is_linear(chain: Chain) -> bool:
    return op_name(chain.linear) == "linear"


def _class_dims(logits: torch.Tensor) -> tuple[int, ...]:
    """The numbers that the dimension of classes has: the second one, the only one of a vector."""
    place = min(1, logits.dim() - 1)
    return place, place - logits.dim()


def _rows_last(logits: Node) -> tuple[Node, Node | None]:
    """Logits with their classes last: the node itself for [N, V]; for [N, V, …] what was transposed, and by what."""
    rank = value(logits).dim()
    if rank <= 2 or op_name(logits) not in ("transpose", "permute", "movedim"):
        return logits, None
    given = arguments(logits)
    order = list(range(rank))
    if op_name(logits) == "transpose":
        a, b = given["dim0"] % rank, given["dim1"] % rank
        order[a], order[b] = order[b], order[a]
    elif op_name(logits) == "permute":
        order = [d % rank for d in given["dims"]]
    else:
        source, to = given["source"], given["destination"]
        if not (isinstance(source, int) and isinstance(to, int)):
            return logits, None
        order.insert(to % rank, order.pop(source % rank))
    return (logits.args[0], logits) if order == [0, rank - 1, *range(1, rank - 1)] else (logits, None)  # type: ignore[return-value]


def _from_linear(logits: Node) -> bool:
    """Whether a linear layer is near above: then a refusal is worth telling."""
    node: Any = logits
    for _ in range(12):
        if not isinstance(node, Node) or node.op != "call_function":
            return False
        if op_name(node) in ("linear", "matmul", "mm"):
            return True
        node = next(iter(node.all_input_nodes), None)
    return False
