"""`fuseline.save`: an optimized model as safetensors and JSON."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..calibrate import call_arguments
from ..compiler.errors import UserError
from ..compiler.expressions import Expression, Memo, Output
from ..compiler.pipeline import Pipeline
from ..compiler.plan import Plan
from ..compiler.program import Program
from ..compiler.reads import derived_reads, plain_reads
from ..compiler.weights import STORE
from ..optimize import Optimized, optimized
from . import construct, tensors
from .manifest import NAME, Derived, Entry, Manifest, plan_name, replacing
from .state import PARAMETER, Held, memory, order_of, state_of
from .tensors import Kind

_OURS = re.compile(r"model-[0-9a-f]{12}\.safetensors|plan-[0-9a-f]{12}\.(json|safetensors)")


def save(model: torch.nn.Module, path: str | Path, example: Any = None) -> Path:
    """Writes an optimized model to a folder that `fuseline.load` makes it from again; returns the folder.

    What is stored: the values that its graphs derived from weights (codes, scales), the parameters that some graph
    reads as they are or that no graph has read, all buffers, the pipeline and the plan. Originals that graphs read
    only quantized or folded are not stored, whether the model still has them or not.

    Args:
        model: optimized, and called at least once, so that its graphs say what they read.
        path: a new or empty folder, or an older artifact, which stays whole until the new one is.
        example: a tensor, a tuple of arguments or a dict of keyword arguments to call a model with that never was.

    Raises:
        UserError: the model was not optimized or never called; the folder holds something else; the disk is full.
    """
    state = optimized(model)
    if example is not None:
        args, kwargs = call_arguments(example)
        with torch.no_grad():
            model(*args, **kwargs)
    if not state.compilations and not state.derived:
        raise UserError(
            "this model was optimized and never called, so nothing is known of what its graphs read",
            remedy="call it once under torch.no_grad(), or fuseline.save(model, path, example=(input_ids,))",
        )
    _check_pipeline(state.pipeline)
    folder = Path(path)
    _check_folder(folder)
    contents = _Contents(model, state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, contents, state.plan)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from error
    return folder


def _check_pipeline(pipeline: Pipeline) -> None:
    """Refuses a pipeline that could not be read back."""
    text = str(pipeline)
    try:
        same = Pipeline(text) == pipeline
    except UserError as error:
        raise UserError(
            f"the pipeline '{text}' could not be read back: {error.headline}",
            remedy="give the pass its name with fuseline.register, here and where the artifact is loaded",
        ) from error
    if not same:
        raise UserError(f"the pipeline '{text}' would be read back as another: '{Pipeline(text)}'")


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{folder} is a file, and an artifact is a folder")
    if folder.is_dir() and not (folder / NAME).is_file() and any(not _is_left_over(p) for p in folder.iterdir()):
        raise UserError(
            f"{folder} holds other files, and no artifact",
            [f"found: {', '.join(sorted(p.name for p in folder.iterdir())[:6])}"],
            "save to a new folder",
        )


def _is_left_over(path: Path) -> bool:
    """Whether an interrupted save left this file."""
    return path.name.startswith(".writing-") or _OURS.fullmatch(path.name) is not None


class _Contents:
    """What goes into the artifact of a model: each tensor's type, and where its values come from."""

    def __init__(self, model: torch.nn.Module, state: Optimized):
        self.model, self.pipeline = model, str(state.pipeline)
        self.held = state_of(model)
        self.by_name = {h.name: h.tensor for h in self.held}
        self.names = {id(h.tensor): h.name for h in reversed(self.held)}  # the first of a tied parameter's names
        plain, derived = self._reads(state)
        consumed = {n for e in derived for n in e.parameters()}
        roles = {h.name: h.role for h in self.held}
        self.only_derived = {
            n for n in consumed - plain
            if roles[n] == PARAMETER and (self.by_name[n].is_floating_point() and self.by_name[n].numel() > 1)
        }  # fmt: skip
        lost = [
            h.name for h in self.held if STORE.dropped(h.tensor) and self.names[id(h.tensor)] not in self.only_derived
        ]
        if lost:
            raise UserError(
                f"the values of '{lost[0]}' were dropped, and no graph of this pipeline has read what is held of them",
                remedy="call the model before it is saved; or optimize it with the pipeline that it was dropped under",
            )
        self.derived = [e for e in derived if self.only_derived & set(e.parameters())]
        self._expressions: dict[str, Expression] = {}
        self._shared: tuple[tuple[str, ...], Memo] = (), {}

    def _reads(self, state: Optimized) -> tuple[set[str], list[Expression]]:
        """The names of what graphs read as it is, and the expressions that they read, over this model's names."""
        plain: set[str] = set()
        derived: dict[Expression, None] = dict.fromkeys(state.derived)
        for compilation in state.compilations:
            program = compilation.program
            plain |= {name for n in plain_reads(program) if (name := self._name(program, n)) is not None}
            for expression in derived_reads(program):
                names = {n: self._name(program, n) for n in expression.parameters()}
                known = {n: name for n, name in names.items() if name is not None}
                if len(known) == len(names):
                    derived[expression.rename(known)] = None
                else:  # over a tensor that is not the model's: whoever builds the model makes it again
                    plain |= set(known.values())
        return plain, list(derived)

    def _name(self, program: Program, source: str) -> str | None:
        """What the model calls a tensor that a graph was captured with; a replaced one is found by its name."""
        tensor = program.sources[source].tensor
        if id(tensor) in self.names:
            return self.names[id(tensor)]
        here = self.by_name.get(source)
        return self.names[id(here)] if here is not None and Kind.of(here) == Kind.of(tensor) else None

    def manifest(self) -> Manifest:
        """The manifest, but for the files; `value` gives the tensors that it names."""
        manifest = Manifest(self.pipeline, construct.describe(self.model), versions=_versions())
        stored: dict[Any, str] = {}
        for held in self.held:
            manifest.state[held.name] = self._entry(held, stored)
        numbers: Counter[str] = Counter()
        for expression in self.derived:
            base = f"{expression.parameters()[0]}/{_part(expression)}"
            name = f"{base}#{numbers[base]}" if numbers[base] else base
            numbers[base] += 1
            manifest.derived.append(Derived(expression, _kind(expression, self._over(expression)), name))
        self._expressions = {d.tensor: d.expression for d in manifest.derived}
        return manifest

    def value(self, name: str) -> torch.Tensor:
        """A stored tensor. What neighbours share (a quantization gives codes and scales) is computed once."""
        expression = self._expressions.get(name)
        if expression is None:
            return self.by_name[name]
        if self._shared[0] != expression.parameters():
            self._shared = expression.parameters(), {}
        return STORE.peek(expression, self._over(expression), self._shared[1])

    def _over(self, expression: Expression) -> list[torch.Tensor]:
        return [self.by_name[n] for n in expression.parameters()]

    def _entry(self, held: Held, stored: dict[Any, str]) -> Entry:
        kind, first = Kind.of(held.tensor), self.names[id(held.tensor)]
        if first != held.name:
            return Entry(held.role, kind, same_as=first)
        if held.name in self.only_derived:
            return Entry(held.role, kind)
        name = stored.setdefault(memory(held.tensor), held.name)
        return Entry(held.role, kind, tensor=name, order=order_of(held.tensor))


def _part(expression: Expression) -> str:
    """`codes` for the codes of a quantized weight, packed or not."""
    for part in expression.walk():
        if isinstance(part, Output):
            return part.name
    return "value"


def _kind(expression: Expression, over: list[torch.Tensor]) -> Kind:
    """The type of a derived value, from what is held or from an evaluation without values."""
    value = STORE.find(expression, over)
    if value is None:
        fakes = dict(zip(expression.parameters(), (torch.empty_like(t, device="meta") for t in over), strict=True))
        value = expression.evaluate(fakes.__getitem__)
    return Kind.of(value)


def _write(folder: Path, contents: _Contents, plan: Plan | None) -> None:
    """Tensors and plan under new names first, the manifest that names them last: the step from old to new is one."""
    manifest = contents.manifest()
    before = {p.name for p in folder.iterdir() if _OURS.fullmatch(p.name)}
    with _scratch(folder) as scratch, torch.no_grad():
        written = scratch / "model.safetensors"
        manifest.bytes, manifest.sha256 = tensors.write(written, manifest.kinds(), contents.value)
        manifest.file = f"model-{manifest.sha256[:12]}.safetensors"
        written.replace(folder / manifest.file)
        if plan is not None:
            saved = plan.save(scratch / "plan.json")
            manifest.plan = plan_name(saved)
            for suffix in (".safetensors", ".json"):
                saved.with_suffix(suffix).replace((folder / manifest.plan).with_suffix(suffix))
        for name in ("config", "generation_config"):
            if name in manifest.model:
                with replacing(folder / f"{name}.json") as path:
                    path.write_text(json.dumps(manifest.model[name], indent=2), encoding="utf-8")
    manifest.save(folder)
    plan_file = Path(manifest.plan or "")
    for name in before - {manifest.file, plan_file.name, plan_file.with_suffix(".safetensors").name if plan else ""}:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    for left in folder.glob(".writing-*"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    scratch = tempfile.mkdtemp(dir=folder, prefix=".writing-")
    try:
        yield Path(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _versions() -> dict[str, str]:
    from .. import __version__

    found = {"fuseline": __version__, "torch": torch.__version__}
    with contextlib.suppress(PackageNotFoundError):
        found["transformers"] = version("transformers")
    return found
