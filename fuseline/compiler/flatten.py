"""Back to plain ATen: regions inlined and dialect ops replaced by their naive twins, by tracing once more.

For compilers that know no dialect (Inductor) and for autograd, where an anchor's own derivative in ATen is better than
one through an opaque op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from . import compat
from .inliner import Inliner
from .ops import Kind, Op, find
from .program import Program


def anchors_only(op: Op) -> bool:
    """For training: norms and gated units keep their own compact derivative."""
    return op.kind is Kind.ANCHOR


def flatten(program: Program, module: GraphModule, which: Callable[[Op], bool] = lambda op: True) -> GraphModule:
    """The lifted `module` of `program` traced again, dialect ops that `which` accepts written out in ATen."""
    fakes: Sequence[Any] = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    with torch.enable_grad() if program.training else torch.no_grad():
        return flatten_on(fakes, program.fake_mode, module, which)


def flatten_on(
    fakes: Sequence[Any], mode: FakeTensorMode, module: GraphModule, which: Callable[[Op], bool] = lambda op: True
) -> GraphModule:
    """`module` traced again on inputs of another mode, with sizes of their own; see `flatten`."""

    class Naive(Inliner):
        def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            op = find(target)
            if op is not None and which(op) and not op.stays_whole:
                return op.naive(*args, **kwargs)
            return super().call_function(target, args, kwargs)

        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inner = self.fetch_attr(target)
            return Naive(inner).run(*args) if isinstance(inner, GraphModule) else inner(*args, **kwargs)

    return compat.trace(lambda *inputs: Naive(module).run(*inputs), fakes, mode)
