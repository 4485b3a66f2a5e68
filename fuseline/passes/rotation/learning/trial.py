"""Programs with some of the rotations and all that follows, run so that gradients reach the rotations' matrices.

Rounding has no derivative: a value that is quantized and dequantized passes its gradient straight through (Bengio et
al., 2013). Weights are folded in float32 here, in float64 where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter, Node

from ....compiler import ops
from ....compiler.expand import EXPANSIONS
from ....compiler.expressions import Blocks, Cast, Expression, Hadamard, Planned, block_product, rounding_in
from ....compiler.framework import Pass, Tier
from ....compiler.hadamard import core, factor
from ....compiler.program import Program
from ....compiler.rewriter import Rewriter
from .losses import Criterion

if TYPE_CHECKING:
    from .. import Rotate, Rotations

AGAIN = 25
"""Runs after which the narrowed ranges of a weight that changes are searched for again."""

DENSE = 4096
"""Channels up to which a Hadamard transform is one product with its matrix here."""


class Variants:
    """Makes programs: the one before, with chosen rotations, as the passes behind leave it.

    after: the passes up to the last lossy one; for those that want data themselves, what stands for them.
    """

    def __init__(self, step: Rotate, program: Program, after: Sequence[Pass]):
        self.step, self.program = step, program
        able = [stand_in for later in after if (stand_in := later.without_data()) is not None]
        last = max((i for i, later in enumerate(able) if later.tier is Tier.LOSSY), default=-1)
        self.after = able[: last + 1]
        self.rewriter: Rewriter | None = None

    def site(self, node: Node) -> str:
        """The site of a node of the program that is being made."""
        assert self.rewriter is not None
        return self.rewriter.site(node)

    def make(self, labels: Sequence[str], rotations: Rotations) -> Program:
        """The program with these of r1 … r4, their matrices given by `rotations`."""
        program = self.program.copy()
        if labels:
            self.rewriter = Rewriter(program, self.step.name)
            self.step.only(labels).apply(program, self.rewriter, rotations)
        for later in self.after:
            later.run(program, Rewriter(program, later.name))
            program.state |= later.ensures
        return program


class Trial(Interpreter):
    """Runs a program on flat arguments of one call; rounding passes gradients through.

    leaves: tensors that stand for planned matrices, in float32, whose gradients are wanted.
    """

    def __init__(self, program: Program, leaves: Mapping[Planned, torch.Tensor] | None = None):
        super().__init__(program.module)
        self.program, self.leaves = program, dict(leaves or {})
        self.flat: Sequence[Any] = ()
        self.constants: dict[Any, torch.Tensor] = {}
        self.depends: dict[Expression, bool] = {}
        self.parts: dict[Expression, torch.Tensor | float] = {}
        self.runs = 0

    def __call__(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """The flat results."""
        self.flat = flat
        if self.runs % AGAIN == 0:
            self.parts.clear()
        self.runs += 1
        results = self.run(*[flat[i] for i in self.program.arguments])
        return tuple(results) if isinstance(results, (list, tuple)) else (results,)

    def run_node(self, node: Node) -> Any:
        weight = node.meta.get("weight") if node.op == "get_attr" else None
        if weight is not None:
            lazily = all(user.target in EXPANSIONS for user in node.users) and rounding_in(weight) is not None
            return None if lazily else self.weight(weight)
        if node.op != "call_function":
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.target in EXPANSIONS:
            return self._dequantized(node, args)
        op = ops.find(node.target)
        if op is None:
            return super().run_node(node)
        if op is ops.hadamard:
            return self._transformed(*args, **kwargs)
        if op.name not in ("quantize", "quantize_affine", "encode", "encode_at"):
            return op.naive(*args, **kwargs)
        made = op.naive(args[0].detach(), *args[1:], **kwargs)
        codes = made if isinstance(made, torch.Tensor) else made[0]
        codes.rounded_from = args[0]  # for `_dequantized`
        return made

    def _dequantized(self, node: Node, args: Sequence[Any]) -> torch.Tensor:
        given: Any = node.args[0]
        expression = given.meta.get("weight")
        rounded = rounding_in(expression) if expression is not None else None
        if rounded is None:
            op = ops.find(node.target)
            assert op is not None
            back = op.naive(*args)
            x = getattr(args[0], "rounded_from", None)
            return back if x is None else x + (back - x.detach())
        varies, dtype = self._varies(rounded), node.args[-1]
        if not varies and (rounded, dtype) in self.constants:
            return self.constants[rounded, dtype]
        weight, scheme = self.weight(rounded.x), rounded.scheme
        fixed = weight.detach()
        if rounded not in self.parts:
            self.parts[rounded] = scheme.narrowed(fixed)
        back = scheme.rounded(fixed, self.parts[rounded]).to(dtype)
        return weight + (back - fixed) if varies else self.constants.setdefault((rounded, dtype), back)

    def _varies(self, expression: Expression) -> bool:
        if expression not in self.depends:
            self.depends[expression] = expression in self.leaves or any(map(self._varies, expression.operands()))
        return self.depends[expression]

    def weight(self, expression: Expression) -> torch.Tensor:
        """An expression's value; gradients flow from it to the leaves in it."""
        if not self._varies(expression):
            if expression not in self.constants:
                with torch.no_grad():
                    value = expression.evaluate(self._parameter)
                self.constants[expression] = value.float() if value.dtype is torch.float64 else value
            return self.constants[expression]
        if expression in self.leaves:
            return self.leaves[expression]  # type: ignore[index]
        if isinstance(expression, Cast) and expression.dtype is torch.float64:
            return self.weight(expression.x).float()
        values = [self.weight(operand) for operand in expression.operands()]
        if isinstance(expression, Blocks):
            x, by = (v.float() for v in values)
            return block_product(x, by, expression.dim)
        if isinstance(expression, Hadamard):
            x = values[0].movedim(expression.dim, -1)
            split = factor(expression.block or x.shape[-1])
            dense = core(split.order, x.device) if split.order > 1 else None
            return self._transformed(x, dense, split.n).movedim(-1, expression.dim)
        made: torch.Tensor = expression.compute(values, self._parameter)
        return made

    def _transformed(
        self, x: torch.Tensor, core: torch.Tensor | None = None, block: int = 0, signs: bool = False
    ) -> torch.Tensor:
        """A Hadamard transform, as one product where the matrix is small: it has some fifty steps otherwise."""
        n = block or x.shape[-1]
        if n > DENSE:
            return ops.hadamard.naive(x, core, block, signs)
        if (key := (n, x.dtype, x.device)) not in self.constants:
            eye = torch.eye(n, dtype=torch.float64, device=x.device)
            self.constants[key] = ops.hadamard.naive(eye, core, n, signs).to(x.dtype)
        return (x.unflatten(-1, (-1, n)) @ self.constants[key]).flatten(-2)

    def _parameter(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self.flat[self.program.sources[name].index].detach()
        return found


def loss_of(measure: Criterion, original: Trial, trial: Trial, flat: Sequence[Any]) -> torch.Tensor:
    """What `trial` costs on one batch, against the program as it was; gradients flow through `trial` alone."""
    with torch.no_grad():
        before = original(flat) if measure.compares else ()
    return measure(flat, before, trial(flat))


@torch.no_grad()
def mean_loss(measure: Criterion, original: Trial, trial: Trial, data: Sequence[Sequence[Any]]) -> float:
    """The mean of that over all batches."""
    return sum(loss_of(measure, original, trial, flat).item() for flat in data) / len(data)
