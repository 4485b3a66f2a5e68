"""A model that was loaded over codes, as a checkpoint of compressed-tensors: the same codes under other names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..compiler.capture import capture
from ..compiler.errors import UserError
from ..compiler.pipeline import Pipeline
from ..compiler.program import Program
from ..models.coded import CodedLinear
from ..passes import Fuse, Raise
from .compressed import Tensors, tensors
from .parameters import Assignment
from .planning import Planned
from .quantization import Quantization, coded, configuration, refuse_dtype
from .transforms import Transforms
from .unify import Unified

KEPT = "fuseline.save keeps it, for fuseline.load"


def linears_of(model: torch.nn.Module) -> dict[str, CodedLinear]:
    """The linears over codes, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CodedLinear)}


def plan(
    model: torch.nn.Module,
    captured: Program,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    pipeline: Pipeline,
    format: str,
) -> Planned:
    """What an export of a model with `linears_of` writes.

    Raises:
        UserError: another format, a pass that would change weights, or codes that compressed-tensors has no place for.
    """
    if format != "compressed-tensors":
        raise UserError(
            f"{type(model).__name__} was loaded over codes, and a plain checkpoint has no place for them",
            remedy="--format compressed-tensors (format='compressed-tensors')",
        )
    changing = [step for step in pipeline.passes if not isinstance(step, (Raise, Fuse))]
    if changing:
        raise UserError(
            f"{type(model).__name__} was loaded over codes, which '{changing[0]}' does not change",
            ["a pass that changes weights takes the model's original ones"],
            "-p raise (no pipeline in Python), which writes the codes; or load the original model",
        )
    linears, found = linears_of(model), Quantization()
    for name, linear in linears.items():
        _refuse(model, name, linear)
        rounding = None if linear.inputs is None else linear.inputs.scheme
        found.linears[name] = coded(name, linear.scheme, rounding)
        found.loaded[name] = linear
    plain = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found.config = configuration(found.linears, plain, None)
    rewritten = captured
    if any(linear.inputs is not None for linear in linears.values()):
        with _unrounded(linears):
            rewritten = capture(model, *inputs)
    return Planned(rewritten, Unified(), Assignment(captured), Transforms(), found, [])


def _refuse(model: torch.nn.Module, name: str, linear: CodedLinear) -> None:
    if linear.order is not None:
        raise UserError(
            f"the channels of '{name}' are ordered by their groups (desc_act), which compressed-tensors cannot say",
            ["its releases from 0.20 on have no weight_g_idx"],
            KEPT,
        )
    refuse_dtype(name, linear.scheme, model.dtype)  # type: ignore[arg-type]
    if linear.scheme.of.scaling == "real" and not torch.equal(
        linear.scale.to(model.dtype).to(linear.scale.dtype),  # type: ignore[arg-type]
        linear.scale,
    ):
        raise UserError(
            f"the scales of '{name}' are {str(linear.scale.dtype).removeprefix('torch.')}, and the model is "
            f"{str(model.dtype).removeprefix('torch.')}, which does not hold them",
            ["compressed-tensors multiplies with scales in the model's dtype, which would change the weights"],
            "--dtype float32 (load(…, torch.float32) in Python)",
        )


def stored(linear: CodedLinear, format: str, dtype: torch.dtype) -> Tensors:
    """A linear's tensors, by their names in its module; dtype: of real scales, which hold them."""
    scheme = linear.scheme
    parts = {"codes": scheme.unpack(linear.codes, linear.in_features), "scale": linear.scale}
    if scheme.of.scaling == "real":
        parts["scale"] = linear.scale.to(dtype)
    parts |= {name: part for name in ("zero", "outer") if (part := getattr(linear, name)) is not None}
    made = tensors(format, scheme, parts, torch.Size((linear.out_features, linear.in_features)))
    if linear.input_scale is not None:
        made["input_scale"] = linear.input_scale.to(dtype)
    if linear.input_zero is not None:
        made["input_zero_point"] = (linear.input_zero.to(torch.int16) - 128).to(torch.int8)
    return made


@contextlib.contextmanager
def _unrounded(linears: dict[str, CodedLinear]) -> Iterator[None]:
    """The linears without the rounding of their inputs."""
    before = {name: linear.inputs for name, linear in linears.items()}
    for linear in linears.values():
        linear.inputs = None
    try:
        yield
    finally:
        for name, linear in linears.items():
            linear.inputs = before[name]
