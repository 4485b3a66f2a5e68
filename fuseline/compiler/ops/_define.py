"""How a dialect op is defined: schema, naive twin, fake, backward and cost in one file.

    @op("scale_rows(Tensor x, Tensor s) -> Tensor", kind=Kind.POINTWISE)
    def scale_rows(x, s):                  # the naive twin: what the op means, in plain PyTorch
        return x * s[..., None]

    @scale_rows.fake                       # optional: without it the naive twin runs on fake tensors
    def _(x, s): return torch.empty_like(x)

    @scale_rows.backward                   # optional: without it the naive twin's own derivative is traced
    def _(ctx, grad): ...

The op is then `torch.ops.fuseline.scale_rows.default`, opaque to Dynamo and AOTAutograd, and runs on any device
through its naive twin.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

LIBRARY = torch.library.Library("fuseline", "DEF")
REGISTRY: dict[str, Op] = {}


class Kind(enum.Enum):
    """How codegen may treat an op: which subgraphs it can join."""

    POINTWISE = "pointwise"  # one output element reads the matching elements of its inputs
    ROW = "row"  # one output row reads the matching rows of its inputs (last dimension)
    ANCHOR = "anchor"  # a template of its own: attention, matrix products
    OTHER = "other"


class Cost(NamedTuple):
    """Of one call; sizes may be symbolic."""

    flops: Any
    bytes: Any


class Op:
    """A dialect op: callable, with the overload that appears in graphs as `op.overload`."""

    def __init__(self, schema: str, naive: Callable[..., Any], kind: Kind, whole: bool = False, records: bool = False):
        self.name, self.whole = schema.split("(")[0], whole
        self.schema, self.naive, self.kind = schema, naive, kind
        self.cost_rule: Callable[..., Any] | None = None
        self.backward_rule: Callable[..., Any] | None = None
        self.workspace_rule: Callable[..., Any] | None = None
        self.template: str | None = None
        self.__doc__ = naive.__doc__
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, naive, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.fuseline, self.name).default
        torch.library.register_fake(f"fuseline::{self.name}", naive, lib=LIBRARY)
        if not (records or self.overload._schema.is_mutable):  # what is written in place has no derivative
            torch.library.register_autograd(
                f"fuseline::{self.name}", self._backward, setup_context=_save_all, lib=LIBRARY
            )
        REGISTRY[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Shape and dtype of the result, where the naive twin is too slow or too strict to run on fake tensors."""
        torch.library.register_fake(f"fuseline::{self.name}", function, lib=LIBRARY, allow_override=True)
        return function

    def backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The derivative, given a context with the op's tensors (`saved_tensors`) and all its arguments (`layout`, a
        pair each: whether it is one of those tensors, else its value), and the gradients of its results."""
        self.backward_rule = function
        return function

    def autograd(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """How autograd records a call, in the place of `backward`: for an op that computes gradients with its result.
        Such an op is defined with `records`."""
        LIBRARY.impl(self.name, function, "Autograd")
        return function

    def cost(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """FLOPs and bytes of one call, from the fake inputs; sizes may be symbolic."""
        self.cost_rule = function
        return function

    def workspace(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Bytes that a call has for itself while it runs, from the fake inputs; sizes may be symbolic."""
        self.workspace_rule = function
        return function

    def lowers_to(self, template: str) -> None:
        """Names the template that generates this op's kernel."""
        self.template = template

    def _backward(self, ctx: Any, *grads: torch.Tensor | None) -> Any:
        return (self.backward_rule or self._traced_backward)(ctx, *grads)

    def _traced_backward(self, ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """The derivative of the naive twin: plain PyTorch, so AOTAutograd traces it into ATen ops."""
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if is_tensor else value for is_tensor, value in ctx.layout]
        needs = ctx.needs_input_grad + (False,) * (len(args) - len(ctx.needs_input_grad))  # defaults were left out
        with torch.enable_grad():
            leaves = [
                a.detach().requires_grad_(need) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                for a, need in zip(args, needs, strict=True)
            ]
            outputs = self.naive(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            if pairs and wanted
            else [None] * len(wanted)
        )
        by_input = [next(found) if isinstance(a, torch.Tensor) and a.requires_grad else None for a in leaves]
        return tuple(by_input[: len(ctx.needs_input_grad)])


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.layout = [(isinstance(a, torch.Tensor), None if isinstance(a, torch.Tensor) else a) for a in inputs]
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, torch.Tensor)))


def op(
    schema: str, kind: Kind = Kind.OTHER, whole: bool = False, records: bool = False
) -> Callable[[Callable[..., Any]], Op]:
    """Defines `fuseline::<schema>` with the decorated function as its naive twin.

    whole: never written out in ATen, other compilers call the op, too: the twin's steps depend on its data, so that no
    graph can hold them, or its memory on their order. records: see `Op.autograd`.
    """
    return lambda naive: Op(schema, naive, kind, whole, records)


def find(target: Any) -> Op | None:
    """The dialect op behind a node's target, if it is one. What only marks a gradient (`gradients.py`) is none."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "fuseline":
        return REGISTRY.get(target._opname)
    return None
