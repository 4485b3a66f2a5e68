"""Rotations at run time as `transform_config` of compressed-tensors.

A transform is named by a type, a size and the modules that it is attached to, and its matrix may be stored beside the
module's own parameters, as `MODULE.GROUP_LOCATION.weight`:

    type              what a reader makes of a value        used for
    hadamard          x·H/√n, H Sylvester's, 2^k only       hadamard, blocks of 2^k channels: the same matrix as here
    random-hadamard   x·M/√n, M the stored matrix           every other: M = R·√n; without the tensor, another matrix

Checked with compressed-tensors 0.20.1, whose code for both this follows.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compiler.errors import UserError
from ..compiler.expressions import Expression, Param
from ..compiler.program import Program
from .rotations import Matrix
from .unify import Mismatch, Online

LARGEST = 256
"""compressed-tensors has a matrix for every multiple of 4 up to here, and for those times a power of two; it makes one
for each transform before it reads the stored one."""


class MissingPackage(UserError):
    """compressed-tensors is not installed."""

    @classmethod
    def check(cls, what: str) -> None:
        """Raises itself where the package is missing; what: "… are read", of what it does."""
        try:
            import compressed_tensors  # noqa: F401
        except ImportError as error:
            headline = f"{what} by compressed-tensors, which is not installed"
            raise cls(headline, [str(error)], "pip install compressed-tensors") from error


@dataclass
class Transforms:
    """config: what goes under `transform_config`, None where nothing is left at run time.

    matrices: name in the checkpoint → the rotation whose matrix is stored there.
    """

    config: dict[str, Any] | None = None
    matrices: dict[str, Matrix] = field(default_factory=dict)

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A stored matrix R·√n: signs in the model's dtype, other numbers in float32."""
        matrix = self.matrices[name]
        scaled = matrix.values() * matrix.block**0.5
        signs = scaled.round()
        exact = bool((scaled - signs).abs().max() < 1e-9) and bool((signs.abs() == 1).all())
        return signs.to(dtype) if exact else scaled.to(torch.float32)


def transforms(model: torch.nn.Module, program: Program, online: Sequence[Online]) -> Transforms:
    """The configuration of what is left at run time.

    Raises:
        Mismatch: a rotation that compressed-tensors has no place or no matrix for.
    """
    if not online:
        return Transforms()
    linears = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    targets_of: dict[tuple[str, Matrix], dict[str, None]] = {}
    for one in online:
        _refuse(one)
        target = one.module if one.weight is None else _linear(one, one.weight, program, linears)
        targets_of.setdefault(("R3" if one.weight is None else "R4", one.matrix), {})[target] = None
    groups: dict[str, Any] = {}
    found = Transforms({"config_groups": groups})
    for (label, matrix), targets in targets_of.items():
        serial = sum(name.startswith(label) for name in groups)
        name = f"{label}_{serial}" if serial else label
        stored = matrix.kind != "hadamard" or not _is_power_of_two(matrix.block)
        places = ("q_attn", "k_cache") if label == "R3" else ("input",)
        groups[name] = {
            "type": "random-hadamard" if stored else "hadamard",
            "head_dim": matrix.block,
            "precision": "torch.float32",
            "randomize": False,
            "requires_grad": False,
            "apply": [{"targets": [*targets], "location": p, "inverse": False, "ignore": []} for p in places],
        }
        if stored:
            found.matrices[f"{next(iter(targets))}.{name}_{places[0]}.weight"] = matrix
    return found


def _linear(one: Online, weight: Expression, program: Program, linears: dict[int, str]) -> str:
    name = weight.name if isinstance(weight, Param) else None
    linear = linears.get(id(program.sources[name].tensor)) if name is not None else None
    if linear is None:
        raise Mismatch(
            f"the input of {one.site} is rotated at run time ({one.matrix}), and its weight {name or ''} is no "
            "nn.Linear's",
            ["compressed-tensors attaches a rotation to the input of a Linear module, and to nothing else here"],
        )
    return linear


def _refuse(one: Online) -> None:
    n = one.matrix.block
    while n > LARGEST and n % 2 == 0:
        n //= 2
    if (n > LARGEST or n % 4) and not _is_power_of_two(one.matrix.block):
        raise Mismatch(
            f"{one.site} is rotated at run time ({one.matrix}), and compressed-tensors has no matrix of that size",
            [f"it has those of 4·k·2^m with 4·k up to {LARGEST}, and makes one before it reads the stored one"],
        )


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def apply(model: torch.nn.Module, config: dict[str, Any], stored: dict[str, torch.Tensor]) -> None:
    """Has compressed-tensors attach the transforms to a model, and fills in their stored matrices.

    Raises:
        MissingPackage: it is not installed.
    """
    MissingPackage.check("rotations at run time are applied")
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        apply_transform_config(model, TransformConfig.model_validate(config))
    with torch.no_grad():
        for name, tensor in stored.items():
            model.get_parameter(name).copy_(tensor)
