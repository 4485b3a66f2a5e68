"""What every verb begins with: a model, captured as one graph, and a pipeline over it."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fuseline.compiler.action import Observer
from fuseline.compiler.capture import capture, from_exported
from fuseline.compiler.errors import UserError, VerificationError, nearest
from fuseline.compiler.observe import Numerics
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.program import Program
from fuseline.compiler.report import Report
from fuseline.models import LoadedModel
from fuseline.models.text import evaluation_text, windows

CAPTURE_TOKENS = 64
# What "equal up to rounding" means for an exact pass, as max|Δ|/max|reference| beyond the error before it.
EXACT = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Rewritten:
    """A program before and after a pipeline."""

    captured: Program
    program: Program
    report: Report


def capture_model(loaded: LoadedModel) -> Program:
    """One graph of the model: a language model's on real text with its length symbolic, others' on their example."""
    if loaded.exported is not None:
        inputs = (loaded.example_args, loaded.example_kwargs)
        return from_exported(loaded.exported, _owners(loaded), inputs)
    if loaded.tokenizer is not None:
        device = loaded.example_args[0].device
        ids = windows(evaluation_text(), loaded.encode, CAPTURE_TOKENS, 1)[0]
        loaded.example_args = (ids.to(device), *loaded.example_args[1:])
    with silent_export():
        return capture(loaded.model, loaded.example_args, loaded.example_kwargs, dynamic=loaded.dynamic_shapes())


@contextlib.contextmanager
def silent_export() -> Iterator[None]:
    """torch.export prints the graph and warnings before it raises; the error that it raises says what matters."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def _owners(loaded: LoadedModel) -> dict[str, Callable[[], torch.Tensor]]:
    """Reads the parameters of a `.pt2` file from the module, which may have been moved to a GPU."""
    model = loaded.model
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    return {name: functools.partial(operator.attrgetter(name), model) for name in names}


def rewrite(
    loaded: LoadedModel, pipeline: Pipeline, verify: str | None, observers: Sequence[Observer] = ()
) -> Rewritten:
    """Captures the model and runs the pipeline over it, with the error after each pass.

    Args:
        verify: None runs the quick checks of the graph; "quick" also holds exact passes to their bound; "full"
            recomputes all values, too.

    Raises:
        VerificationError: an exact pass whose error is beyond rounding.
    """
    if verify not in (None, "quick", "full"):
        raise UserError(f"unknown verification {verify!r}{nearest(str(verify), ['quick', 'full'])}")
    captured = capture_model(loaded)
    program, report = pipeline.run(
        captured, [Numerics(), *observers], verification="full" if verify == "full" else "quick"
    )
    if verify is not None:
        check_exact(report, loaded)
    return Rewritten(captured, program, report)


def check_exact(report: Report, loaded: LoadedModel) -> None:
    """Holds every exact pass to its bound: what it adds to the error before it is rounding."""
    dtypes = {p.dtype for p in loaded.model.parameters() if p.is_floating_point()}
    bound = max((EXACT.get(dtype, 0.0) for dtype in dtypes), default=EXACT[torch.float32])
    before = report.captured_error or 0.0
    for record in report.passes:
        error = record.error or 0.0
        if record.tier == "exact" and error > before + bound:
            raise VerificationError(
                f"pass '{record.name}' is exact and changed the results",
                [f"max|Δ|/max|reference| went from {before:.2g} to {error:.2g}; rounding allows {bound:.0e} more"],
                "fuseline run MODEL -p … --dump DIR    writes the program after each pass, runnable",
            )
        before = error
