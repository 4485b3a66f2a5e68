"""Running a program so that gradients reach values, its weights as they are."""

from __future__ import annotations

import torch

from ...compiler.expressions import Expression
from ..rotation.learning.trial import Trial


class Running(Trial):
    """Like `Trial`, without matrices that are learned: weights keep their type."""

    def weight(self, expression: Expression) -> torch.Tensor:
        if expression not in self.constants:
            with torch.no_grad():
                self.constants[expression] = expression.evaluate(self._parameter)
        return self.constants[expression]
