"""Checkpoints of compressed-tensors, as llm-compressor writes them: `quantization_config` read.

The package compressed-tensors is not needed. What a group of the configuration says of the weights becomes a `Layout`,
and of inputs that are rounded at run time a `Rounding`; what neither can say is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fuseline.compiler.errors import UserError
from fuseline.compiler.schemes import Scheme
from fuseline.models.coded import Rounding
from fuseline.models.compressed_linear import CompressedLinear, Layout
from fuseline.models.headers import Headers
from fuseline.models.packing import WIDTHS

METHOD = "compressed-tensors"

INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized")
FLOATS = {
    ("float-quantized", 8): ("e4m3", ("tensor", "channel", "group", "block")),
    ("naive-quantized", 8): ("e4m3", ("tensor", "channel", "group", "block")),
    ("mxfp8-quantized", 8): ("mxfp8", ("group",)),
    ("mxfp4-pack-quantized", 4): ("mxfp4", ("group",)),
    ("nvfp4-pack-quantized", 4): ("nvfp4", ("tensor_group",)),
}
"""The number format, and for what there can be a scale, of a format's name with weights of so many bits."""


@dataclass(frozen=True)
class Group:
    """Linears that are stored alike: `targets` are names, class names, or patterns after `re:`."""

    targets: tuple[str, ...]
    layout: Layout
    inputs: Rounding | None


def prepared(config: dict[str, Any], headers: Headers) -> dict[str, Any]:
    """The configuration, which is what `replace` needs.

    Raises:
        UserError: something that is not read, and what it is.
    """
    read(config)
    return config


def read(config: dict[str, Any]) -> list[Group]:
    """The groups of a `quantization_config`.

    Raises:
        UserError: something that is not read, and what it is.
    """
    if config.get("quantization_status", "compressed") != "compressed":
        raise _refused(f"its weights are '{config['quantization_status']}', and no codes are stored")
    if config.get("kv_cache_scheme"):
        raise _refused(
            "it quantizes keys and values (kv_cache_scheme)", "quantize{keys=int8,values=int8} does, when run"
        )
    if (config.get("transform_config") or {}).get("config_groups"):
        raise _refused("it has rotations at run time (transform_config)", "rotate{r1,r2} leaves none")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refused("its weights are stored sparse (sparsity_config)")
    return [_group(name, group, config.get("format")) for name, group in config.get("config_groups", {}).items()]


def _group(name: str, group: dict[str, Any], default: str | None) -> Group:
    format = str(group.get("format") or default)
    weights, inputs = group.get("weights"), group.get("input_activations")
    where = f"'{name}'"
    if weights is None:
        raise _refused(f"{where} quantizes no weights")
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    as_integers = format in INTEGERS and kind == "int"
    if not as_integers and (kind != "float" or (format, bits) not in FLOATS):
        raise _refused(f"{where} is in the format '{format}' with {kind}{bits} weights")
    if as_integers and bits not in (WIDTHS if format == "pack-quantized" else range(1, 9)):
        raise _refused(f"{where} has {bits}-bit codes, which releases of compressed-tensors pack in several ways")
    if group.get("output_activations"):
        raise _refused(f"{where} rounds outputs")
    strategy = weights.get("strategy") or ("group" if (weights.get("group_size") or 0) > 0 else "channel")
    number, strategies = (
        FLOATS.get((format, bits), ("", ())) if kind == "float" else ("", ("tensor", "channel", "group"))
    )
    if strategy not in strategies:
        raise _refused(f"{where} has a scale for each {strategy}")
    if not as_integers and not weights.get("symmetric", True):
        raise _refused(f"{where} has zero points beside floating-point codes")
    ordered = weights.get("actorder") in ("group", "dynamic", True)
    if ordered and (format != "pack-quantized" or strategy != "group"):
        raise _refused(f"{where} orders channels by activation (weight_g_idx) in the format '{format}', by {strategy}")
    grouped = strategy in ("group", "tensor_group")
    blocks = tuple(weights["block_structure"]) if strategy == "block" else None
    layout = Layout(
        format in ("pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"), bits,
        {"tensor": -1, "block": blocks[1] if blocks else 0}.get(strategy, weights["group_size"] if grouped else 0),
        weights.get("symmetric", True), number, blocks[0] if blocks else 1, ordered,
    )  # fmt: skip
    block = layout.prescribed
    if block and layout.group != block:
        raise _refused(f"{where} has {number} in groups of {layout.group}, and its blocks are of {block}")
    return Group(tuple(group["targets"]), layout, None if inputs is None else _rounding(where, inputs))


def _rounding(where: str, inputs: dict[str, Any]) -> Rounding:
    strategy, bits = inputs.get("strategy"), inputs.get("num_bits", 8)
    kind, dynamic = inputs.get("type", "int"), inputs.get("dynamic")
    symmetric, size = inputs.get("symmetric", True), inputs.get("group_size")
    floating = kind == "float" and bits == 8 and symmetric
    mx = floating and strategy == "group" and size == 32 and "uint8" in str(inputs.get("scale_dtype"))
    format = "mxfp8" if mx else "e4m3" if floating else f"int{bits}"
    read = kind == "int" or floating
    if dynamic is True and read and (strategy in ("token", "group") or (strategy == "tensor" and symmetric)):
        group = int(size or 0) if strategy == "group" else 0
        return Rounding(Scheme(format, group, symmetric, rows=int(strategy != "tensor")))
    if not dynamic and read and strategy == "tensor" and bits == 8:
        return Rounding(Scheme(format, 0, symmetric, rows=0, static=True))
    at = "fixed scales" if not dynamic else "run time" if dynamic is True else f"run time ({dynamic})"
    raise _refused(f"{where} rounds inputs to {kind}{bits} at {at}, by {strategy}")


def _refused(why: str, remedy: str | None = None) -> UserError:
    details = [
        "read are integer weights (int-quantized; pack-quantized of 1, 2, 4 and 8 bits), float-quantized, mxfp8, mxfp4 "
        "and nvfp4, and inputs rounded by token, group or tensor"
    ]
    return UserError(f"a checkpoint of compressed-tensors that is not read: {why}", details, remedy)


def find(model: nn.Module, groups: Iterable[Group], ignore: Iterable[str]) -> dict[str, Group]:
    """The modules that the groups' targets name or match, by name, without those that `ignore` does.

    As compressed-tensors has it: a name comes before patterns, and these before classes, each in alphabetical order.
    """
    owner = {target: group for group in groups for target in group.targets}
    found: dict[str, Group] = {}
    for name, module in model.named_modules():
        matching = [(rank, t) for t in owner if (rank := _rank(name, module, t)) is not None]
        if matching and all(_rank(name, module, i) is None for i in ignore):
            found[name] = owner[min(matching)[1]]
    return found


def _rank(name: str, module: nn.Module, target: str) -> int | None:
    """0: the target is the module's name; 1: a pattern that it begins with; 2: a class of it; None: none of these."""
    if target.startswith("re:"):
        return 1 if re.match(target.removeprefix("re:"), name) else None
    if name == target:
        return 0
    return 2 if any(kind.__name__ == target for kind in type(module).__mro__) else None


def replace(model: nn.Module, config: dict[str, Any]) -> None:
    """Puts a `CompressedLinear` in the place of each linear that the configuration quantizes.

    Raises:
        UserError: it quantizes another module, or a group does not divide a linear's inputs.
    """
    for name, group in find(model, read(config), config.get("ignore") or ()).items():
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise _refused(f"'{name}', which it quantizes, is a {type(linear).__name__}")
        if group.layout.group > 0 and linear.in_features % group.layout.group:
            raise _refused(f"groups of {group.layout.group} do not divide the {linear.in_features} inputs of '{name}'")
        model.set_submodule(name, CompressedLinear(linear, group.layout, group.inputs))
