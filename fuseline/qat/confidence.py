"""Confidence-guided annealing: the weights that are sure of their code stay where they are.

A weight whose distance from the nearest boundary between two codes is more than a small part of a step would keep its
code whatever the next gradients say; those at a boundary swing from one code to the other and back, and with them what
all others are fitted to. For the last steps of a training the sure ones are frozen, so that the others settle. Source:
OFQ (Liu et al., 2023, section 4.3), with 0.005 of a step.

A weight that is computed from parameters (`query-key`, `rotate`) has elements that nothing can hold apart: there, the
parameters are trained by the gradients of the unsure elements alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..compiler.errors import UserError
from ..compiler.formats import Element, Integer
from ..compiler.formats.learned import learned
from ..passes.calibrated import Method
from .module import QuantizationAware, Rounded, as_matrix
from .wrapper import Wrapper


class ConfidenceAnnealing(Wrapper):
    """Steps `base` with the gradients of rounded weights that are sure of their code set to 0.

        annealing = ConfidenceAnnealing(torch.optim.SGD(qat.parameters(), 1e-4), qat)

    A base with averages made before goes on moving them for a while: give it one of its own.

    Args:
        base: any optimizer of PyTorch's over `qat.parameters()`; without weight decay, which has no gradient.
        boundary: how near to a boundary a weight must lie to be trained, as a part of the step between two codes.
    """

    def __init__(self, base: torch.optim.Optimizer, qat: QuantizationAware, *, boundary: float = 0.005):
        super().__init__(base)
        if not 0 < boundary <= 0.5:
            raise UserError(f"a boundary of {boundary} steps is not between 0 and 0.5", remedy="boundary=0.005")
        if any(group.get("weight_decay") for group in base.param_groups):
            raise UserError("weight decay moves weights that are to stay", remedy="weight_decay=0.0")
        self.qat, self.boundary = qat, boundary
        self.weights = [one for one in qat.rounded if one.one.method is not Method.PARQ]
        schemes = [one.one.scheme for one in self.weights]
        unfit = [str(scheme) for scheme in schemes if learned(scheme.element) is None or scheme.rows != 1]
        if unfit or not self.weights:
            raise UserError(
                "annealing by confidence needs weights on grids of equal steps, a scale for a row or group",
                [f"these are {', '.join(dict.fromkeys(unfit)) or 'none'}"],
                "symmetric integers, midrise2 … midrise4, ternary or binary",
            )
        for rounded in [one for one in self.weights if qat.is_computed(one)]:
            self.weights.remove(rounded)
            qat.gradients[rounded.one.weight] = partial(self._of_unsure, rounded)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base, on the gradients that are left."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rounded in self.weights:
            parameter, weight = self.qat.editable(rounded)
            if parameter.grad is not None:
                gradient = as_matrix(rounded.one.weight, parameter.grad)
                assert gradient is not None
                gradient.mul_(self.unsure(rounded, weight))
        self.base.step()
        self.steps += 1
        return loss

    @torch.no_grad()
    def _of_unsure(self, rounded: Rounded, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.unsure(rounded, weight)

    def unsure(self, rounded: Rounded, weight: torch.Tensor) -> torch.Tensor:
        """Which elements of a weight [out, in] lie at a boundary between two codes, bool."""
        scheme = rounded.one.scheme
        groups, grid = scheme.grid(weight)
        if rounded.key is None:
            scale, _ = grid.of(groups, scheme.narrowed(weight))
        else:
            rule, stored = learned(scheme.element), torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
            assert rule is not None
            scale = rule.scale(self.qat.range(rounded), stored).to(groups.dtype).unsqueeze(-1)
        near = at_boundary(groups / scale, scheme.element, self.boundary)
        return near.flatten(-2)


def at_boundary(scaled: torch.Tensor, element: Element, boundary: float) -> torch.Tensor:
    """Whether numbers in units of the scale lie within `boundary` steps of where two codes meet."""
    step = 2.0 if element.name == "binary" else 1.0
    low = float(element.ends[0]) if isinstance(element, Integer) else -element.top
    place = (scaled - low) / step  # codes are whole numbers here, and boundaries half-way between them
    near = (place - torch.floor(place) - 0.5).abs() <= boundary
    return near & (place > 0) & (place < (element.top - low) / step)
