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
from fuseline.compiler.debug.check import EXACT
from fuseline.compiler.errors import UserError, VerificationError, nearest
from fuseline.compiler.observe import Numerics
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.plan import Plan
from fuseline.compiler.program import Program
from fuseline.compiler.report import Report
from fuseline.compiler.verifier import LEVELS
from fuseline.models import LoadedModel
from fuseline.models.text import evaluation_text, windows

CAPTURE_TOKENS = 64


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
    captured: Program,
    pipeline: Pipeline,
    verify: str | None,
    observers: Sequence[Observer] = (),
    plan: Plan | None = None,
) -> Rewritten:
    """Runs the pipeline over a program, with the error after each pass where there are inputs to run it on.

    Args:
        verify: None runs the quick checks of the graph, "off" none; "quick" also holds exact passes to their bound;
            "full" recomputes all values, too.
        plan: what passes that need data decided.

    Raises:
        VerificationError: an exact pass whose error is beyond rounding.
    """
    if verify not in (None, *LEVELS):
        raise UserError(f"unknown verification {verify!r}{nearest(str(verify), LEVELS)}")
    numerics = [] if captured.examples is None or verify == "off" else [Numerics()]
    level = verify if verify in ("off", "full") else "quick"
    program, report = pipeline.run(captured, [*numerics, *observers], verification=level, plan=plan)
    if verify in ("quick", "full"):
        if not numerics:
            raise UserError(
                "the errors of exact passes cannot be checked: this program has types and no values",
                remedy="leave --verify out, or dump the stage again with its tensors",
            )
        check_exact(report, captured)
    return Rewritten(captured, program, report)


def check_exact(report: Report, captured: Program) -> None:
    """Holds every exact pass to its bound: what it adds to the error before it is rounding."""
    dtypes = {s.tensor.dtype for s in captured.sources.values() if s.tensor.is_floating_point()}
    bound = max((EXACT.get(dtype, 0.0) for dtype in dtypes), default=EXACT[torch.float32])
    before = report.captured_error or 0.0
    for record in report.passes:
        error = record.error or 0.0
        if record.tier == "exact" and error > before + bound:
            raise VerificationError(
                f"pass '{record.name}' is exact and changed the results",
                [f"max|Δ|/max|reference| went from {before:.2g} to {error:.2g}; rounding allows {bound:.0e} more"],
                'fuseline bisect MODEL -p "…"    names the rewrite and its rule',
            )
        before = error
