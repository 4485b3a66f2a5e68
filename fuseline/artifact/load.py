"""`fuseline.load`: a model from an artifact, never holding its original weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..compiler.errors import UserError
from ..compiler.pipeline import Pipeline
from ..compiler.plan import Plan
from ..compiler.structure import describe_value
from ..compiler.weights import STORE, stand_in
from ..optimize import optimize, optimized
from ..originals import guard
from . import construct, tensors
from .manifest import NAME, Manifest, plan_name
from .state import ATTRIBUTE, PARAMETER, in_order, put, refuse_left_on_meta, state_of
from .tensors import Kind


def load(
    path: str | Path,
    model: construct.Builder = None,
    *,
    device: torch.device | str | None = None,
    target: str | None = None,
    **settings: Any,
) -> torch.nn.Module:
    """The model that `fuseline.save` wrote to the folder `path`: in eval mode, frozen, its originals dropped.

    Graphs and kernels are made again from the pipeline and the plan, at the first call; nothing in the folder is run.

    Args:
        model: how to build a model that is no class of transformers: a function without arguments, called under
            `torch.device("meta")`, or an instance, whose parameters are replaced.
        device: where the tensors go; torch's default device when left out.
        target: as in `fuseline.optimize`; an artifact belongs to no target.
        settings: further settings of `fuseline.optimize`: verify, observers, cuda_graphs, dynamic, fullgraph.

    Raises:
        UserError: an artifact that is missing, truncated, damaged, foreign or of another version, or a model that is
            not the one that was saved. Nothing is changed then, the instance given as `model` included.
    """
    folder = Path(path)
    manifest = Manifest.load(folder)
    pipeline, plan = _pipeline(folder, manifest), _plan(folder, manifest)
    _check_tensors(folder, manifest)
    where = _device(device)
    built = construct.build(manifest.model, model)
    _check_state(built, manifest)
    refuse_left_on_meta(built, manifest.state)
    values, digest = tensors.read(folder / manifest.file, manifest.kinds(), where)
    if digest != manifest.sha256:
        raise UserError(
            f"{folder / manifest.file} is damaged: its contents are not those that were saved",
            [f"SHA-256 saved: {manifest.sha256}", f"SHA-256 found: {digest}"],
            "copy or save the artifact again",
        )
    _fill(built, manifest, values, where)
    built.eval()
    optimize(built, pipeline, plan=plan, target=target, keep_originals=False, **settings)
    optimized(built).derived = tuple(d.expression for d in manifest.derived)
    by_name = {h.name: h.tensor for h in state_of(built)}
    STORE.drop(by_name[name] for name, e in manifest.state.items() if e.tensor is None and e.same_as is None)
    for derived in manifest.derived:
        over = [by_name[n] for n in derived.expression.parameters()]
        STORE.adopt(derived.expression, over, values[derived.tensor])
    guard(built)
    return built


def _pipeline(folder: Path, manifest: Manifest) -> Pipeline:
    try:
        if manifest.pipeline.endswith(".toml"):
            raise UserError("it names a file")
        return Pipeline(manifest.pipeline)
    except UserError as error:
        raise UserError(
            f"{folder} was saved with the pipeline '{manifest.pipeline}', which cannot be read here: {error.headline}",
            [f"saved by fuseline {manifest.versions.get('fuseline', '?')}"],
            "import the package that the pass comes from, so that it is registered",
        ) from error


def _plan(folder: Path, manifest: Manifest) -> Plan | None:
    if manifest.plan is None:
        return None
    plan = Plan.load(folder / manifest.plan)
    if plan_name(folder / manifest.plan) != manifest.plan:
        raise UserError(
            f"{folder / manifest.plan} is damaged: its contents are not those that were saved",
            remedy="copy or save the artifact again",
        )
    if plan.pipeline != manifest.pipeline:
        raise UserError(
            f"{folder / manifest.plan} is the plan of another pipeline",
            [f"plan: {plan.pipeline}", f"artifact: {manifest.pipeline}"],
            "copy or save the artifact again",
        )
    state = {n: describe_value(torch.empty(e.kind.shape, dtype=e.kind.dtype, device="meta"))
             for n, e in manifest.state.items()}  # fmt: skip
    for name, kind in plan.model.items():
        if state.get(name) != kind:
            raise UserError(
                f"{folder / manifest.plan} is the plan of another model: '{name}' is {kind} there and "
                f"{state.get(name, 'absent')} here",
                remedy="copy or save the artifact again",
            )
    return plan


def _check_tensors(folder: Path, manifest: Manifest) -> None:
    """The tensor file is there, whole, and holds what the manifest says."""
    path = folder / manifest.file
    again = "copy or save the artifact again"
    if not path.is_file():
        raise UserError(f"{folder} lacks its tensor file {manifest.file}", remedy=again)
    found = tensors.kinds_in(path)
    for name, kind in manifest.kinds().items():
        if name not in found:
            raise UserError(f"{path} lacks the tensor '{name}'", [f"it holds {len(found)} others"], again)
        if found[name] != kind:
            raise UserError(f"{path}: tensor '{name}' is {found[name]}, and {NAME} says {kind}", remedy=again)
    if path.stat().st_size != manifest.bytes:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, and {manifest.bytes} were saved: it is not this artifact's",
            remedy=again,
        )


def _device(device: torch.device | str | None) -> torch.device:
    try:
        where = torch.device(device) if device is not None else torch.get_default_device()
        if where.type == "meta":
            raise RuntimeError("the device 'meta' holds no values")
        return torch.empty(0, device=where).device
    except (RuntimeError, AssertionError) as error:
        message = str(error).strip().splitlines()[0]
        raise UserError(f"nothing can be loaded to the device '{device}': {message}", remedy="device='cpu'") from None


def _check_state(model: torch.nn.Module, manifest: Manifest) -> None:
    """The module that was built has the saved one's parameters and buffers."""
    here = {h.name: h for h in state_of(model)}
    name, headline = type(model).__name__, "is not the model that was saved"
    remedy = "build the same module: the same class, sizes and edits"
    for held in here.values():
        if held.name not in manifest.state and held.role != ATTRIBUTE:
            raise UserError(f"{name} {headline}: it has a {held.role} '{held.name}', and the artifact none", (), remedy)
    for saved, entry in manifest.state.items():
        if saved not in here:
            if entry.role == ATTRIBUTE:
                continue
            raise UserError(f"{name} {headline}: it has no {entry.role} '{saved}'", (), remedy)
        shape = tuple(here[saved].tensor.shape)
        if entry.role != ATTRIBUTE and shape != entry.kind.shape:
            raise UserError(
                f"{name} {headline}: '{saved}' is {Kind.of(here[saved].tensor)} here and {entry.kind} there", (), remedy
            )


def _fill(model: torch.nn.Module, manifest: Manifest, values: dict[str, torch.Tensor], device: torch.device) -> None:
    """Puts the saved tensors into the module, tied ones as one object, and stand-ins for those that are not stored."""
    filled: dict[str, torch.Tensor] = {}
    for name, entry in manifest.state.items():
        if entry.same_as is not None:
            continue
        if entry.tensor is None:
            tensor = stand_in(entry.kind.shape, entry.kind.dtype, device)
        else:
            tensor = in_order(values[entry.tensor], entry.order)
        filled[name] = torch.nn.Parameter(tensor, requires_grad=False) if entry.role == PARAMETER else tensor
    for name in manifest.state.keys() & {h.name for h in state_of(model)}:
        put(model, name, filled[manifest.state[name].same_as or name])
