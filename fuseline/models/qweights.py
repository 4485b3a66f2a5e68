"""What the readers of GPTQ's and AWQ's words share: linears that are found by the names of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fuseline.compiler.errors import UserError, nearest
from fuseline.models.coded import StoredLinear
from fuseline.models.headers import Header, Headers


def refused(method: str, why: str, detail: str | None = None) -> UserError:
    """The error for a checkpoint that is not read."""
    return UserError(f"a checkpoint of {method} that is not read: {why}", [detail] if detail else [])


def checked(method: str, name: str, headers: Headers, needed: tuple[str, ...]) -> dict[str, Header]:
    """The headers of a linear's tensors, by their own names.

    Raises:
        UserError: one is missing, is no matrix (a list, for g_idx), or is of another kind of numbers.
    """
    found: dict[str, Header] = {}
    for part in needed:
        header = headers.get(f"{name}.{part}")
        if header is None:
            have = sorted(n.removeprefix(f"{name}.") for n in headers if n.startswith(f"{name}."))
            raise refused(method, f"the tensor '{name}.{part}' is missing", f"'{name}' has {', '.join(have)}")
        real = header.dtype in ("F16", "BF16", "F32")
        if len(header.shape) != (1 if part == "g_idx" else 2) or (header.dtype != "I32") != real or real != (
            part == "scales"
        ) or 0 in header.shape:  # fmt: skip
            wanted = "a matrix of floating-point numbers" if part == "scales" else "int32"
            raise refused(method, f"'{name}.{part}' is {header.dtype} {list(header.shape)}, not {wanted}")
        found[part] = header
    return found


def dtype_of(name: str) -> torch.dtype:
    """A floating-point type by its name in a safetensors header."""
    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[name]


def replace_linears(
    method: str,
    model: nn.Module,
    linears: dict[str, dict[str, Any]],
    make: Callable[[nn.Linear, dict[str, Any]], StoredLinear],
) -> None:
    """Puts what `make` gives in the place of the linears of these names.

    Raises:
        UserError: the model has no linear of that name, or one of another size.
    """
    modules = dict(model.named_modules())
    if not linears:
        raise refused(method, "it has no tensor named qweight", "its weights are stored in another way, or are plain")
    for name, one in linears.items():
        linear = modules.get(name)
        if linear is None:
            raise refused(method, f"'{name}.qweight' has no place in {type(model).__name__}{nearest(name, modules)}")
        if type(linear) is not nn.Linear:
            raise refused(method, f"'{name}', which has codes, is a {type(linear).__name__}")
        if linear.in_features != one["channels"]:
            raise refused(
                method, f"'{name}.qweight' has {one['channels']} channels, and the linear {linear.in_features} inputs"
            )
        model.set_submodule(name, make(linear, one))
