"""`fuseline.prepare_qat`: a model as a module that rounds as it will be quantized, and can be trained so."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..calibrate import Call, call_arguments
from ..compiler.errors import UserError
from ..compiler.framework import Tier
from ..compiler.pipeline import Pipeline
from .module import QuantizationAware


def prepare_qat(
    model: torch.nn.Module, pipeline: Any, example: Any, *, dropout: bool = True, dynamic: Any = "auto"
) -> QuantizationAware:
    """A module to train in `model`'s place, by any optimizer and loop; `fuseline.convert` quantizes what came of it.

        qat = fuseline.prepare_qat(model, "raise,quantize{weights=ternary,method=paretoq}", (ids,))
        optimizer = torch.optim.AdamW(qat.parameters(), 2e-5, weight_decay=0.0)
        ...
        model = fuseline.convert(qat)

    Args:
        model: its parameters are trained in place.
        pipeline: with a `quantize` whose method is rtn (LLM-QAT: ranges taken from the weights at each step), paretoq
            (ranges learned) or parq (the optimizer `fuseline.qat.PARQ` draws the weights to the grid); and passes
            before it, such as raise and rotate.
        example: the arguments of one call: a tensor, a tuple, or a dict of keyword arguments.
        dropout: whether `train()` runs the graph that the model has in that mode; False runs that of `eval()` in both,
            which some models need: those that skip layers at random.
        dynamic: `dynamic_shapes` of `torch.export.export`; "auto" lets each size of the example's tensors vary where
            the model does not fix it, None none.

    Raises:
        UserError: nothing is quantized in the pipeline, or a pass decides from data.
        CaptureError: the model is not one graph.
    """
    chosen = Pipeline(pipeline)
    if not any(step.tier is Tier.LOSSY for step in chosen.passes):
        raise UserError(
            f"'{chosen}' rounds nothing that training could get used to",
            remedy=f"{chosen},quantize{{weights=int4:sym,method=paretoq}}",
        )
    for step in chosen.passes:
        if step.needs_data and not step.is_trained:
            raise UserError(
                f"'{step}' decides from data once, and training changes the weights",
                remedy="drop it, or choose method=paretoq or rtn",
            )
    call = call_arguments(example)
    sizes = _automatic(model, call) if dynamic == "auto" else dynamic
    return QuantizationAware(model, chosen, call, sizes, dropout)


def _automatic(model: torch.nn.Module, call: Call) -> Any:
    """Every size of every tensor may vary, where it is not 0 or 1: those PyTorch takes for constants."""
    args, kwargs = call
    named = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    return pytree.tree_map(_every_size, named)


def _every_size(value: Any) -> Any:
    return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) if isinstance(value, torch.Tensor) else None
