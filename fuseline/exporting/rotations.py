"""Rotations, read back from what `rotate` left: in a weight's expression, and at run time in a graph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..compiler.expressions import (
    Blocks,
    Cast,
    Concat,
    Expression,
    Hadamard,
    HadamardCore,
    Orthogonal,
    Planned,
    Scale,
    Signs,
)
from ..compiler.hadamard import hadamard_matrix, random_orthogonal, random_signs
from ..compiler.ops import hadamard
from ..compiler.planned import kept
from ..passes.raising.nodes import op_name


@dataclass(frozen=True)
class Matrix:
    """R on each block of `block` channels.

    kind: hadamard, random-hadamard, orthogonal or learned; seed: of the second and third; digest: of a learned matrix.
    """

    kind: str
    block: int
    seed: int | None = None
    digest: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}, blocks of {self.block}{'' if self.seed is None else f', seed {self.seed}'}"

    def values(self) -> torch.Tensor:
        """R, float64 [block, block]: what a row of channels is multiplied by from the right."""
        if self.digest is not None:
            return kept(self.digest).double().cpu()
        if self.kind == "orthogonal":
            assert self.seed is not None
            return random_orthogonal(self.block, self.seed)
        made = hadamard_matrix(self.block)
        signs = self.signs()
        return made if signs is None else torch.tensor(signs, dtype=torch.float64)[:, None] * made

    def signs(self) -> tuple[int, ...] | None:
        return random_signs(self.block, self.seed) if self.kind == "random-hadamard" and self.seed is not None else None

    def to_json(self) -> dict[str, Any]:
        """signs_sha256: of the signs as int8, −1 being 255; matrix: a learned one's digest."""
        record: dict[str, Any] = {"kind": self.kind, "block": self.block, "seed": self.seed}
        if self.digest is not None:
            record["matrix"] = self.digest
        signs = self.signs()
        if signs is not None:
            record["signs_sha256"] = hashlib.sha256(bytes(s % 256 for s in signs)).hexdigest()
        return record


def folded(value: Expression) -> Iterator[tuple[Matrix, int]]:
    """The rotations that were folded into a weight, each with the dimension that it turns, innermost last."""
    for part in value.walk():
        if isinstance(part, Blocks):
            matrix = _dense(part.by)
            if matrix is not None:
                yield matrix, part.dim
        elif isinstance(part, Hadamard):
            signs = _signs(part.x.by) if isinstance(part.x, Scale) and part.x.dim == part.dim else None
            if signs is None:
                yield Matrix("hadamard", part.block), part.dim
            else:
                yield Matrix("random-hadamard", part.block, signs.seed), part.dim


@dataclass(frozen=True)
class Turned:
    """A value x·R that a graph computes at run time."""

    x: Node
    matrix: Matrix


def peel(node: Any) -> Turned | None:
    """The value and the rotation, where a node is a value rotated at run time."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target is hadamard.overload:
        x = node.args[0]
        _, core, block = (*node.args, *(None, 0)[len(node.args) - 1 :])[:3]
        if core is not None and not isinstance(_weight(core), HadamardCore):
            return None
        block = block or node.meta["val"].shape[-1]
        if op_name(x) == "mul" and (signs := _signs(_weight(x.args[1]))) is not None:
            return Turned(x.args[0], Matrix("random-hadamard", block, signs.seed))
        return Turned(x, Matrix("hadamard", block))
    if op_name(node) == "flatten" and op_name(node.args[0]) == "matmul":
        inner: Any = node.args[0]
        found = peel(inner)
        blocks = inner.args[0]
        return Turned(blocks.args[0], found.matrix) if found is not None and op_name(blocks) == "unflatten" else None
    if op_name(node) == "matmul":
        made = _weight(node.args[1])
        matrix = _dense(made.x if isinstance(made, Cast) else made)
        return Turned(node.args[0], matrix) if matrix is not None else None  # type: ignore[arg-type]
    return None


def _dense(value: Expression | None) -> Matrix | None:
    """A rotation that is written as a whole matrix."""
    if isinstance(value, Orthogonal):
        return Matrix("orthogonal", value.n, value.seed)
    return Matrix("learned", value.shape[0], digest=value.digest) if isinstance(value, Planned) else None


def _weight(node: Any) -> Expression | None:
    return node.meta.get("weight") if isinstance(node, Node) else None


def _signs(value: Expression | None) -> Signs | None:
    """The signs, where a vector is nothing else, or the same ones over and over."""
    if isinstance(value, Concat) and len(set(value.xs)) == 1:
        value = value.xs[0]
    return value if isinstance(value, Signs) else None
