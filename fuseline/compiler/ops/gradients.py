"""fuseline::sum_gradient and fuseline::scale_gradient: a tensor as it is, whose gradient is not.

Both return a view, so a parameter costs no copy. They mark in the graph what a program does to gradients where it
meets its caller: sums those of a replicated tensor over a process group, or scales them. They are views with a
derivative of their own, which `op` does not define; they have no kernel and need none.
"""

from __future__ import annotations

from typing import Any

import torch

from ._define import LIBRARY

LIBRARY.define("sum_gradient(Tensor(a) x, str group, float factor=1.0) -> Tensor(a)")
LIBRARY.define("scale_gradient(Tensor(a) x, float factor) -> Tensor(a)")


def _view(x: torch.Tensor, *settings: Any) -> torch.Tensor:
    return x.view_as(x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str, factor: float) -> torch.Tensor:
        ctx.group, ctx.factor = group, factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = torch.ops._c10d_functional.all_reduce(grad.contiguous(), "sum", ctx.group)
        total = torch.ops._c10d_functional.wait_tensor(total)
        return (total if ctx.factor == 1.0 else total * ctx.factor), None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.factor, None


def _sum_with_gradient(x: torch.Tensor, group: str, factor: float = 1.0) -> torch.Tensor:
    return _Sum.apply(x, group, factor)


def _scale_with_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    return _Scale.apply(x, factor)


for _name, _function in (("sum_gradient", _sum_with_gradient), ("scale_gradient", _scale_with_gradient)):
    LIBRARY.impl(_name, _view, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _function, "Autograd")

sum_gradient = torch.ops.fuseline.sum_gradient.default
scale_gradient = torch.ops.fuseline.scale_gradient.default
