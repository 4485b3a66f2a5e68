"""`fuseline.analyze`: runs the passes that need data on calibration batches, and gives their Plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .compiler.capture import CapturedModule, capture
from .compiler.errors import UserError
from .compiler.pipeline import Pipeline
from .compiler.plan import Plan
from .compiler.program import Program
from .compiler.reads import refuse_dropped
from .runtime.tensor_store import TensorStore

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


def analyze(
    model: torch.nn.Module, pipeline: Any, calibration: Iterable[Any], checkpoint: str | Path | None = None
) -> Plan:
    """The plan of `pipeline` for `model`; save it with `plan.save(PATH)`, use it as `plan=` of `fuseline.optimize`.

    Args:
        calibration: batches of one shape: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        checkpoint: a file that long searches (learned rotations) write their progress to; a call that was stopped goes
            on from it. It is removed at the end.

    Raises:
        UserError: no batch, or batches that are not laid out alike.
    """
    calls = [call_arguments(batch) for batch in calibration]
    if not calls:
        raise UserError("calibration holds no batch", remedy="calibration=[(input_ids,), …]")
    args, kwargs = calls[0]
    with torch.no_grad():  # decisions are about the weights as they are
        program = capture(model, args, kwargs)
    return analyze_program(program, Pipeline(pipeline), calls, checkpoint)


def analyze_program(
    program: Program, pipeline: Pipeline, calls: Sequence[Call], checkpoint: str | Path | None = None
) -> Plan:
    """`analyze` of a program that was captured from the model; calls: laid out as the captured one."""
    refuse_dropped(program)
    progress = None if checkpoint is None else Path(checkpoint)
    return pipeline.analyze(program, flat_arguments(program, calls), progress, TensorStore())


def flat_arguments(program: Program, calls: Sequence[Call]) -> list[Sequence[Any]]:
    """The flat arguments of calls of the captured model, for `program.run`."""
    module = program.to_module()
    assert isinstance(module, CapturedModule)
    return [module.arguments(*args, **kwargs) for args, kwargs in calls]


def call_arguments(batch: Any) -> Call:
    """The call that a batch stands for: a tensor, a tuple or a dict."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise UserError(f"a calibration batch is a tensor, a tuple or a dict, not {type(batch).__name__}")
