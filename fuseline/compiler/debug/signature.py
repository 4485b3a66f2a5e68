"""What a captured graph asks of its caller: sizes that are symbols, sizes and numbers that are written into it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..compat import known_size
from ..program import Program


@dataclass(frozen=True)
class Input:
    """A tensor that the caller hands in: sizes as numbers, or symbols as text; whether the graph writes to it."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    mutated: bool


@dataclass(frozen=True)
class Fixed:
    """Something of the call that is written into the graph: another value means another capture.

    kind: "size" of a dimension, which becomes a symbol when a second value comes; "constant", one that stays a number
    whatever comes, because of the model's weights or code; "value" of an argument that is no tensor; "attribute" of a
    module that the call itself changes, so that each call is captured.
    """

    kind: str
    name: str
    value: Any

    def __str__(self) -> str:
        if self.kind == "attribute":
            return f"{self.name} changes with every call ({self.value[0]} → {self.value[1]}), and so does the graph"
        return f"{self.name} = {self.value}"


def inputs(program: Program, names: Sequence[str] = ()) -> list[Input]:
    """The tensors among a program's placeholders; `names`: of forward's parameters."""
    found = []
    for node in program.placeholders:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shape = tuple(str(s) if (number := known_size(s)) is None else number for s in value.shape)
            found.append(Input(readable(node.name, names), shape, _dtype(value), node.name in program.mutated))
    return found


def fixed_sizes(
    program: Program, names: Sequence[str] = (), asked: Mapping[str, tuple[int | None, ...]] | None = None
) -> Iterator[Fixed]:
    """Sizes of the caller's tensors that are numbers in the graph; 1 is left out, it is always a number.

    asked: the shapes where every size might be a symbol, by the placeholders' names: `dry_run.sizes_if_asked`.
    """
    for node in program.placeholders:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        for dim, size in enumerate(map(known_size, value.shape)):
            if size is not None and size > 1:
                stays = (asked or {}).get(node.name, (None,) * value.dim())[dim] is not None
                yield Fixed("constant" if stays else "size", f"{readable(node.name, names)}.shape[{dim}]", size)


def fixed_values(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str] = ()) -> Iterator[Fixed]:
    """Arguments that are numbers, flags or text."""
    called = {**{names[i] if i < len(names) else f"args_{i}": value for i, value in enumerate(args)}, **kwargs}
    for name, argument in called.items():
        for path, leaf in pytree.tree_flatten_with_path(argument)[0]:
            if isinstance(leaf, (bool, int, float, str)):
                yield Fixed("value", f"{name}{pytree.keystr(path)}", leaf)


def readable(name: str, names: Sequence[str] = ()) -> str:
    """Dynamo's name of an argument without its marks: `l_input_ids_` → `input_ids`; `l_args_0_` → the first of `names`,
    the parameters of forward."""
    name = name.removeprefix("l_").rstrip("_") or name
    numbered = re.fullmatch(r"args_(\d+)", name)
    if numbered and int(numbered[1]) < len(names):
        return names[int(numbered[1])]
    return name.removeprefix("kwargs_")


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
