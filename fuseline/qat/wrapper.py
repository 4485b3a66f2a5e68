"""The base of optimizers that work round another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Wrapper(torch.optim.Optimizer):
    """An optimizer whose groups, state and learning rates are those of `base`: schedulers may be given either."""

    def __init__(self, base: torch.optim.Optimizer):  # no super().__init__(): all it would make is the base's
        self.base = base
        self.steps = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The base's, and how many steps were taken."""
        return {**self.base.state_dict(), "wrapper": {"steps": self.steps, **self.own_state()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        given = dict(state_dict)
        own = dict(given.pop("wrapper"))
        self.steps = own.pop("steps")
        self.base.load_state_dict(given)
        self.load_own_state(own)

    def own_state(self) -> dict[str, Any]:
        """What this optimizer remembers beside the base."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """The inverse of `own_state`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"
