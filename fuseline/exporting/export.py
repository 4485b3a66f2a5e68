"""`fuseline.export`: a rotated or quantized model as a checkpoint that other tools load."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..calibrate import call_arguments
from ..compiler.capture import capture
from ..compiler.debug.check import EXACT
from ..compiler.errors import FuselineError, UserError, nearest
from ..compiler.expressions import Expression
from ..compiler.pipeline import Pipeline, needs_calibration
from ..compiler.plan import Plan
from ..compiler.precision import error, floats
from ..compiler.program import Program
from ..compiler.report import PassReport
from ..models.huggingface import as_loaded
from ..optimize import Passes, optimized
from ..originals import dropped
from . import experts, loaded_codes
from .huggingface import Progress, refuse_other_models, reload, silent, write
from .planning import Planned, plan as solve
from .rotations import Matrix, folded
from .transforms import MissingPackage

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
FORMATS = ("hf", "compressed-tensors")
RECORD = "fuseline_rotations.json"
RECORD_VERSION = 1


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the folder.
        changed, neutral, copied: numbers of parameters with new values, codes included, of norm weights that were
            folded away, and of those as they were.
        unread: parameters that the captured graph does not read, which are copied as they were.
        rotations: as in the record file.
        transforms: compressed-tensors' `transform_config`; None where no rotation is left at run time.
        quantization: the rest of its `quantization_config`; None where nothing is quantized.
        carried: files that came from the model's source.
        error: max|Δ|/max|reference| between the outputs of the checkpoint, loaded again, and of the rewritten graph;
            both without the rounding of activations, keys and values, for which every reader has its own arithmetic.
        unchecked: why `error` is None.
        passes: reports of the passes.
    """

    path: Path
    changed: int
    neutral: int
    copied: int
    unread: list[str]
    rotations: list[dict[str, Any]]
    transforms: dict[str, Any] | None
    quantization: dict[str, Any] | None
    carried: list[str]
    error: float | None
    unchecked: str | None
    passes: list[PassReport] = field(repr=False, default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All of it but the passes' reports."""
        names = (f.name for f in fields(self) if f.name != "passes")
        return {name: getattr(self, name) for name in names} | {"path": str(self.path)}


def export(
    model: torch.nn.Module,
    path: str | Path,
    pipeline: Passes | None = None,
    *,
    plan: Plan | str | Path | None = None,
    format: str = "hf",
    example: Any = None,
    check: bool = True,
    force: bool = False,
) -> Exported:
    """Writes a model, its weights changed as a pipeline changes them, as a Hugging Face checkpoint.

    transformers loads the folder without Fuseline, and the logits are those of the optimized model. Rotations that are
    left at run time are written as compressed-tensors' `transform_config`, and quantized weights, in the format
    "compressed-tensors", as its codes and scales. The model itself is not changed.

    Args:
        model: of transformers, with its original weights.
        path: a folder that does not exist yet.
        pipeline: its passes; None: the pipeline, and the plan, that `model` was optimized with, or no pass where it was
            loaded over codes, which are then written as they are.
        plan: what passes that need data decided: a Plan, or its file's path.
        format: "hf", without quantization, or "compressed-tensors".
        example: a tensor, a tuple of arguments or a dict of keyword arguments to capture and compare with; a language
            model needs none.
        check: load what was written with transformers and compare the outputs before the folder gets its name.
        force: replace a folder that holds a checkpoint.

    Raises:
        UserError: what a checkpoint cannot hold, and the nearest pipeline that it can; the folder exists; the disk is
            full. Nothing is left under `path` then, and what was there stays.
        FuselineError: the outputs differ by more than rounding.
    """
    decided = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    if pipeline is None and loaded_codes.linears_of(model):
        chosen = Pipeline(())
    elif pipeline is None:
        chosen, decided = optimized(model).pipeline, decided or optimized(model).plan
    else:
        chosen = Pipeline(pipeline)
    if chosen.needs_data and decided is None:
        raise needs_calibration(chosen)
    check_target(path, format, force)
    refuse_other_models(model)
    gone = dropped(model)
    if gone:
        raise UserError(
            f"the values of {len(gone)} weights were dropped (keep_originals=False), and a checkpoint holds them all",
            remedy="load the original model again and export that",
        )
    with _as_it_was(model):
        captured, inputs = _captured(model, example)
        return export_program(
            model, captured, inputs, path, chosen, plan=decided, format=format, check=check, force=force
        )


def export_program(
    model: torch.nn.Module,
    captured: Program,
    inputs: Inputs,
    path: str | Path,
    pipeline: Pipeline,
    *,
    plan: Plan | None = None,
    format: str = "hf",
    check: bool = True,
    force: bool = False,
    progress: Progress = silent,
) -> Exported:
    """`export` of a program that was captured from `model` with these inputs."""
    target = Path(path)
    check_target(target, format, force)
    refuse_other_models(model)
    if loaded_codes.linears_of(model):
        made = loaded_codes.plan(model, captured, inputs, pipeline, format)
    elif experts.merges(pipeline):
        made = experts.plan(model, captured, pipeline, plan, format)
    else:
        made = solve(model, captured, pipeline, plan, format)
    rotations = _rotations(made)
    try:
        with torch.no_grad(), _folder(target, force) as folder:
            carried = write(model, folder, made.assignment, made.transforms, made.quantization, progress)
            _write_record(folder, pipeline, rotations)
            if check:
                progress(0, 0, "loading it again")
            off, unchecked = (None, "check=False") if not check else _compare(folder, model, made, inputs)
    except OSError as problem:
        raise UserError(f"{target} could not be written: {problem.strerror or problem}") from problem
    values = made.assignment.values
    changed = sum(isinstance(value, Expression) for value in values.values())
    copied = len(model.state_dict()) - len(values)
    return Exported(
        target, changed, len(values) - changed, copied, made.assignment.unread, rotations, made.transforms.config,
        made.quantization.config, carried, off, unchecked, made.reports,
    )  # fmt: skip


def check_target(path: str | Path, format: str, force: bool) -> None:
    """Holds an export to a format that there is, and to a folder that it may write.

    Raises:
        UserError: saying what to change.
    """
    target = Path(path)
    if format not in FORMATS:
        raise UserError(f"unknown format '{format}'{nearest(format, FORMATS)}")
    if not target.exists():
        return
    if not force:
        raise UserError(f"{target} exists already", remedy="another folder; or --force (force=True), to replace it")
    if not (target / "config.json").is_file():
        raise UserError(f"{target} is no checkpoint, and is not replaced by one", remedy="another folder")


@contextlib.contextmanager
def _as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """The model's own forward, where it was optimized."""
    compiled, model._compiled_call_impl = getattr(model, "_compiled_call_impl", None), None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


def _captured(model: torch.nn.Module, example: Any) -> tuple[Program, Inputs]:
    """The model in evaluation as one graph, and the inputs of that."""
    training = model.training
    try:
        if example is not None:
            args, kwargs = call_arguments(example)
            return capture(model.eval(), args, kwargs), (args, kwargs)
        loaded = as_loaded(type(model).__name__, model, None).to(model.device)
        inputs = loaded.example_args, loaded.example_kwargs
        return capture(model, *inputs, dynamic=loaded.dynamic_shapes()), inputs
    finally:
        model.train(training)


@contextlib.contextmanager
def _folder(target: Path, force: bool) -> Iterator[Path]:
    """A new folder beside the target, which takes its name when the block ends without an exception."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    new.mkdir()
    try:
        yield new
        if target.exists() and force:
            target.rename(old)
        try:
            if target.exists():  # a rename would replace an empty folder
                raise UserError(f"{target} came to be in the meantime", remedy="another folder")
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _rotations(made: Planned) -> list[dict[str, Any]]:
    """One entry a matrix: what it is, the parameters that it was folded into, and where it is left at run time."""
    sites: dict[Matrix, list[dict[str, Any]]] = {}
    for name, value in made.assignment.values.items():
        if isinstance(value, Expression):
            for matrix, dim in dict.fromkeys(folded(value)):
                sites.setdefault(matrix, []).append({"parameter": name, "dimension": dim, "how": "folded"})
    for one in made.unified.online:
        sites.setdefault(one.matrix, []).append({"site": one.site, "how": "online"})
    return [{**matrix.to_json(), "sites": places} for matrix, places in sites.items()]


def _write_record(folder: Path, pipeline: Pipeline, rotations: list[dict[str, Any]]) -> None:
    from .. import __version__

    record = {
        "format": "fuseline rotations",
        "version": RECORD_VERSION,
        "written_by": f"fuseline {__version__}",
        "pipeline": str(pipeline),
        "rotations": rotations,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _compare(folder: Path, model: torch.nn.Module, made: Planned, inputs: Inputs) -> tuple[float | None, str | None]:
    """How far the outputs of what was written are from the rewritten graph's, on the inputs of the capture.

    Raises:
        FuselineError: further than rounding.
    """
    try:
        again = reload(folder, model)
    except MissingPackage as missing:
        return None, missing.headline
    args, kwargs = inputs
    assert made.rewritten.examples is not None
    reference = floats(made.rewritten.run(made.rewritten.examples))
    written = floats(again(*args, **kwargs))
    if [r.shape for r in reference] != [w.shape for w in written]:
        raise FuselineError("the checkpoint, loaded again, returns other outputs than the rewritten graph")
    worst = max((error(w, r) for w, r in zip(written, reference, strict=True)), default=0.0)
    bound = EXACT.get(model.dtype, EXACT[torch.float32])
    if not worst <= bound:
        raise FuselineError(
            f"the checkpoint, loaded again, is off by {worst:.1e} of the largest output; rounding allows {bound:.0e}",
            ["nothing was written"],
            "fuseline run MODEL -p PIPELINE --verify    whether the passes are at fault; --no-check writes it anyway",
        )
    return worst, None
