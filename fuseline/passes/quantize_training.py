"""What `quantize` puts into a program that is to be trained: rounding with a gradient, and a record of the sites.

method     weights become                                       ranges
rtn        round_through(w)                                     the scheme's own, taken from w at each step
paretoq    fake_quantize(w, α)                                  α, a parameter of its own
parq       w, which the optimizer draws to the grid             the optimizer's
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from ..compiler import ops
from ..compiler.errors import UserError
from ..compiler.expressions import Expression, Planned, Range, Steps
from ..compiler.formats.learned import learned
from ..compiler.plan import SitePlan
from ..compiler.program import TRAINS, Program
from ..compiler.rewriter import Builder
from ..compiler.schemes import Scheme
from .calibrated import TRAINED, Method

if TYPE_CHECKING:
    from .quantize import Quantize

RECORD = "trained"
"""In a program's `module.meta`: the list of what was rounded."""


@dataclass(frozen=True)
class Trained:
    """A weight that training rounds: where, the matrix [out, in], how, and the expression of its ranges, where they are
    trained or set by the optimizer."""

    site: str
    weight: Expression
    scheme: Scheme
    method: Method

    @property
    def range(self) -> Range | None:
        return Range(self.weight, self.scheme) if self.method in TRAINED else None


def trained(program: Program) -> tuple[Trained, ...]:
    """What was rounded in a program that is trained, in graph order."""
    return tuple(program.module.meta.get(RECORD, ()))


def record(program: Program, one: Trained) -> None:
    program.module.meta[RECORD] = [*trained(program), one]


def trained_weight(new: Builder, table: Node, scheme: Scheme, method: Method) -> Node:
    """A weight node [out, in] as training sees it."""
    if method is Method.RTN:
        return new(ops.round_through, table, str(scheme), True)
    if method is Method.PARQ:
        return table
    group = scheme.group_of(int(table.meta["val"].shape[-1]))
    return new(ops.fake_quantize, table, new.weight(Range(table.meta["weight"], scheme)), scheme.format, group)


def by_thresholds(new: Builder, x: Node, scheme: Scheme, name: str, decision: SitePlan | None) -> Node:
    """Values of the run between learned thresholds: those in training, or those that a plan has for the site."""
    device = str(x.meta["val"].device)
    if new.trains:
        return new(ops.fake_staircase, x, new.weight(Steps(name, scheme.bits, device)), scheme.bits)
    if decision is None or "edges" not in decision.tensors:
        raise UserError(
            f"the plan has no thresholds for what {name} reads",
            ["they were trained in a graph in which another site came first"],
            "train and convert with the same pipeline and model",
        )
    parts = (new.weight(Planned.of(decision.tensors[part], device)) for part in ("edges", "step", "low"))
    return new(ops.staircase, x, *parts)


def check_trained(method: Method, weights: Scheme | None) -> None:
    """Refuses what no range is learned for.

    Raises:
        UserError: with a scheme that would do.
    """
    if weights is None:
        raise UserError(
            f"method={method.value} trains ranges of weights, and none are rounded",
            remedy=f"quantize{{weights=midrise2,method={method.value}}}",
        )
    near = weights.format if weights.of.affine and weights.bits > 2 else "midrise2"
    near += f":g{weights.group}" if weights.group and not weights.of.group and weights.rows == 1 else ""
    symmetric = ":sym" if near.startswith("int") else ""
    if learned(weights.element) is None:
        known = "int2 … int8, midrise2 … midrise4, ternary, binary"
        why = "has a zero point" if not weights.symmetric else f"is not one of {known}"
    elif weights.rows != 1:
        why = "has one scale for several rows, and a range is learned for a row or group"
    elif weights.mse:
        why = "has ranges searched for (mse), and these are learned"
    else:
        return
    raise UserError(f"method={method.value}: '{weights}' {why}", remedy=f"weights={near}{symmetric}")


def check_to_train(step: Quantize) -> None:
    """Refuses what is chosen once, from data, when training changes the weights.

    Raises:
        UserError: with what is trained instead.
    """
    activations = step.schemes()["activations"]
    if step.method not in (Method.RTN, *TRAINED):
        raise UserError(
            f"method={step.method.value} chooses codes once, and training changes the weights",
            remedy="method=paretoq, whose ranges are trained too, or method=rtn, which takes them at each step",
        )
    if step.bits is not None:
        raise UserError(
            f"bits={step.bits} chooses formats once, from what each costs, and training changes that",
            remedy="give them by module, overrides=…, as the report of a run with bits=… says them",
        )
    if activations is not None and activations.static:
        raise UserError(
            f"'{activations}': a static range is found once, from data, and training changes the values",
            remedy=f"activations={activations.format}:token, or int2:thresholds … int4:thresholds, which are trained",
        )


def needs_gradient(program: Program, weight: Expression) -> str | None:
    """Why a weight that wants a gradient is not rounded."""
    if needs_training(program) and any(program.sources[n].trainable for n in weight.parameters()):
        return (
            "its weight wants a gradient, and rounding has none: train it with fuseline.prepare_qat, freeze it "
            "(requires_grad_(False)), or compile under torch.no_grad()"
        )
    return None


def needs_training(program: Program) -> str | None:
    """Why a value that gradients pass through is not rounded."""
    if program.training and TRAINS not in program.state:
        return (
            "gradients pass through it, and rounding has none: train with fuseline.prepare_qat, or call under "
            "torch.no_grad()"
        )
    return None
