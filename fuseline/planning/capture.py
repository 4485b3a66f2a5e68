"""The joint graph of a training step: of a decoder that is known by its sizes alone, or of a model as it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from ..compiler import compat, compat_joint
from ..compiler.capture import from_dynamo
from ..compiler.errors import UserError
from ..compiler.flatten import anchors_only, flatten
from ..compiler.joint import joint_program
from ..compiler.pipeline import Pipeline
from ..compiler.program import Program
from ..models.shapes import Decoder, Shape

LAYERS = 4
"""Blocks that are traced for a shape: the first, the last, and two to see that they repeat."""


def joint_of_shape(shape: Shape, batch: int = 1, loss: bool = True, dtype: torch.dtype = torch.bfloat16) -> Program:
    """A joint graph of LAYERS blocks at a symbolic sequence length; no memory is taken for weights."""
    mode, length = compat_joint.symbolic_length(8192)
    small = replace(shape, layers=min(LAYERS, shape.layers))
    with torch.device("meta"):
        model = Decoder(small, loss).to(dtype)
    names = [name for name, _ in model.named_parameters()]
    with mode:
        empty = lambda p: torch.empty(p.shape, dtype=p.dtype, device="cpu")
        values: list[Any] = [torch.nn.Parameter(empty(p)) for _, p in model.named_parameters()]
        values.append(torch.empty((batch, length), dtype=torch.int64, device="cpu"))

    def step(*given: Any) -> tuple[torch.Tensor]:
        return (torch.func.functional_call(model, dict(zip(names, given[:-1], strict=True)), (given[-1],)),)

    return joint_program(compat_joint.joint_graph(step, values), False, 1)


class _Found(Exception):
    """The joint graph is known; nothing needs to run."""


def joint_of_model(model: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any], pipeline: str) -> Program:
    """The joint graph of a model's step, captured as training captures it, after the passes before autograd. Its loss
    is the output's `loss` where there is one, and else the cross entropy of its logits with the first argument.

    Raises:
        UserError: the model has no parameter to train, or is captured in several graphs.
    """
    found: list[Program] = []

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Any:
        if not torch.is_grad_enabled() or not any(getattr(v, "requires_grad", False) for v in inputs):
            return module.forward
        program, _ = Pipeline(pipeline).run(from_dynamo(module, inputs), verification="off")
        lifted, weights = program.lift()
        plain = flatten(program, lifted, anchors_only)
        bound = [*(inputs[i] for i in program.arguments), *program.binder(weights)(inputs)]

        def take(joint: GraphModule, _: Any, *, num_fwd_outputs: int, **__: Any) -> Any:
            found.append(joint_program(joint, False, num_fwd_outputs))
            raise _Found

        unused = lambda graph_module, fakes: graph_module
        return compat.aot_autograd(plain, bound, unused, unused, take)

    def step(*given: Any, **named: Any) -> torch.Tensor:
        out = model(*given, **named)
        if getattr(out, "loss", None) is not None:
            return out.loss
        logits = getattr(out, "logits", out)
        if not given or given[0].dtype != torch.int64:
            return logits.float().square().mean()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), given[0].flatten())

    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("the model has no parameter that is trained", remedy="model.requires_grad_(True)")
    torch._dynamo.reset()
    try:
        with torch.enable_grad():
            torch.compile(step, backend=backend)(*args, **kwargs)
    except Exception as error:
        if not found:
            raise error
    if not found:
        raise UserError("no graph with a backward was captured", remedy="compile the call that computes the loss")
    return found[0]
