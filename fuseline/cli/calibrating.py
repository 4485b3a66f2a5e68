"""Plans on the command line: `--plan`, and the calibration of a model on text that every machine has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fuseline.calibrate import Call, analyze_program
from fuseline.cli.compiling import capture_model, silent_export
from fuseline.compiler.capture import capture
from fuseline.compiler.errors import UserError
from fuseline.compiler.pipeline import DEFAULT, Pipeline, needs_calibration
from fuseline.compiler.plan import Plan
from fuseline.compiler.program import Program
from fuseline.models import LoadedModel
from fuseline.models.text import calibration_text, windows


@dataclass(frozen=True)
class Size:
    """How much text to calibrate on: `windows` of `length` tokens each, `batch` of them a call."""

    windows: int = 32
    length: int = 256
    batch: int = 4


DEFAULTS = Size()


def passes_and_plan(
    pipeline: str, plan: str | None, model: str, calibrates: bool = False
) -> tuple[Pipeline, Plan | None]:
    """What `-p` and `--plan` say together; where `-p` was left out, a plan brings its pipeline.

    Args:
        calibrates: the caller makes the plan itself where there is none.

    Raises:
        UserError: there is no such plan, it is another pipeline's, or the pipeline needs one.
    """
    passes, decided = Pipeline(pipeline), None if plan is None else Plan.load(plan)
    if decided is not None:
        if pipeline == DEFAULT:
            passes = Pipeline(decided.pipeline)
        decided.check_pipeline(passes)
    elif passes.needs_data and not calibrates:
        raise needs_plan(passes, model)
    return passes, decided


def needs_plan(passes: Pipeline, graph: str) -> UserError:
    """The error for a pipeline without its plan, with the line to copy; a dumped stage is analysed as its model."""
    stage = graph.endswith(".py") and not graph.startswith("py:")
    return needs_calibration(passes, "MODEL" if stage else graph)


def again(passes: Pipeline | str, plan: str | None) -> str:
    """The options of the same pipeline, for the next command: a plan brings its pipeline."""
    return f'-p "{passes}"' if plan is None else f"--plan {plan}"


def calibrate(
    loaded: LoadedModel, passes: Pipeline, size: Size | None = None, checkpoint: str | Path | None = None
) -> tuple[Plan, str]:
    """The plan of a pipeline for a model, and what it was calibrated on, in words.

    Raises:
        UserError: the text holds no window of that length, or the windows fill no whole number of calls.
    """
    with torch.no_grad():  # decisions are about the weights as they are
        calls, said = calibration_calls(loaded, size or DEFAULTS)
        return analyze_program(capture_calls(loaded, calls), passes, calls, checkpoint), said


def capture_calls(loaded: LoadedModel, calls: Sequence[Call]) -> Program:
    """The program of the first of the calls; a model without a tokenizer is captured as it is anywhere else."""
    if loaded.tokenizer is None:
        return capture_model(loaded)
    with silent_export():
        return capture(loaded.model, *calls[0])


def calibration_calls(loaded: LoadedModel, size: Size) -> tuple[Sequence[Call], str]:
    """Calls to calibrate on, and what they are, in words.

    Raises:
        UserError: the text holds no window of that length, or the windows fill no whole number of calls.
    """
    if loaded.tokenizer is None:
        return [(loaded.example_args, loaded.example_kwargs)], "the model's example inputs, as it has no tokenizer"
    return _calls(loaded, size)


def _calls(loaded: LoadedModel, size: Size) -> tuple[Sequence[Call], str]:
    if size.windows % size.batch:
        raise UserError(
            f"{size.windows} windows fill no whole number of calls of {size.batch}",
            remedy=f"--windows {size.windows - size.windows % size.batch or size.batch} --batch {size.batch}",
        )
    found = windows(calibration_text(), loaded.encode, size.length, size.windows)
    found = found[: len(found) - len(found) % size.batch]
    if not found:
        raise UserError(
            f"the calibration text holds no {size.batch} windows of {size.length} tokens", remedy="--length 256"
        )
    device = loaded.example_args[0].device
    batches = torch.cat(found).to(device).split(size.batch)
    calls = [((ids, *loaded.example_args[1:]), loaded.example_kwargs) for ids in batches]
    return calls, f"{len(found)} windows of {size.length} tokens of text"
