"""Checkpoints of compressed-tensors, as llm-compressor writes them: `quantization_config` read, and codes loaded.

transformers loads them through a quantizer of ours, registered under another name: it puts a `StoredLinear` in the
place of each linear that the configuration quantizes, and a `CodedLinear` over the same codes when they are there. The
package compressed-tensors is not needed. Integer weights of 1, 2, 4 and 8 bits are read, and inputs that are rounded
at run time; all else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from fuseline.compiler.errors import UserError
from fuseline.models.coded import Layout, Rounding, StoredLinear
from fuseline.models.packing import WIDTHS

METHOD = "compressed-tensors"
READER = "fuseline-compressed-tensors"


@dataclass(frozen=True)
class Group:
    """Linears that are stored alike: `targets` are names, class names, or patterns after `re:`."""

    targets: tuple[str, ...]
    layout: Layout
    inputs: Rounding | None


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
    format = group.get("format") or default
    weights, inputs = group.get("weights"), group.get("input_activations")
    where = f"'{name}'"
    if weights is None:
        raise _refused(f"{where} quantizes no weights")
    if format not in ("pack-quantized", "int-quantized", "naive-quantized") or weights.get("type", "int") != "int":
        raise _refused(
            f"{where} is in the format '{format}' with {weights.get('type')}{weights.get('num_bits')} weights"
        )
    packed, bits = format == "pack-quantized", weights.get("num_bits", 8)
    if bits not in (WIDTHS if packed else range(1, 9)):
        raise _refused(f"{where} has {bits}-bit codes, which releases of compressed-tensors pack in several ways")
    if weights.get("actorder") in ("group", "dynamic"):
        raise _refused(f"{where} orders channels by activation (weight_g_idx)")
    if group.get("output_activations"):
        raise _refused(f"{where} rounds outputs")
    strategies = {"tensor": -1, "channel": 0, "group": weights.get("group_size")}
    strategy = weights.get("strategy") or ("group" if (weights.get("group_size") or 0) > 0 else "channel")
    if strategy not in strategies:
        raise _refused(f"{where} has a scale for each {strategy}")
    layout = Layout(packed, bits, strategies[strategy], weights.get("symmetric", True))
    return Group(tuple(group["targets"]), layout, None if inputs is None else _rounding(where, inputs))


def _rounding(where: str, inputs: dict[str, Any]) -> Rounding:
    strategy = inputs.get("strategy")
    if inputs.get("type", "int") != "int" or inputs.get("dynamic") is not True or strategy not in ("token", "group"):
        kind = "run time" if inputs.get("dynamic") else "fixed scales"
        raise _refused(
            f"{where} rounds inputs to {inputs.get('type')}{inputs.get('num_bits')} at {kind}, by {strategy}"
        )
    group = inputs["group_size"] if strategy == "group" else 0
    return Rounding(inputs.get("num_bits", 8), group, inputs.get("symmetric", True))


def _refused(why: str, remedy: str | None = None) -> UserError:
    details = [
        "read are int-quantized and pack-quantized weights of 1, 2, 4 and 8 bits, and inputs rounded by token or group"
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
    """Puts a `StoredLinear` in the place of each linear that the configuration quantizes.

    Raises:
        UserError: it quantizes another module, or a group does not divide a linear's inputs.
    """
    for name, group in find(model, read(config), config.get("ignore") or ()).items():
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise _refused(f"'{name}', which it quantizes, is a {type(linear).__name__}")
        if group.layout.group > 0 and linear.in_features % group.layout.group:
            raise _refused(f"groups of {group.layout.group} do not divide the {linear.in_features} inputs of '{name}'")
        model.set_submodule(name, StoredLinear(linear, group.layout, group.inputs))


def finish(model: nn.Module) -> None:
    """Puts a `CodedLinear` in the place of each `StoredLinear`, one after the other."""
    for name, module in list(model.named_modules()):
        if isinstance(module, StoredLinear):
            model.set_submodule(name, module.finished())


def rebuild(model: nn.Module, config: Any) -> None:
    """Gives a model that was built without its values the linears that it was loaded with.

    config: the model's `quantization_config`; one that is not of the quantizer below is none of ours.
    """
    if isinstance(config, dict) and config.get("quant_method") == READER:
        replace(model, config["stored"])
        finish(model)


def redirected(config: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` with which transformers calls the quantizer below.

    Raises:
        UserError: it is not read.
    """
    read(config)
    _register()
    return {"quant_method": READER, "stored": config}


@cache
def _register() -> None:
    from transformers.quantizers import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(READER)
    class Config(QuantizationConfigMixin):
        def __init__(self, stored: dict[str, Any], quant_method: str = READER):
            self.quant_method, self.stored = quant_method, stored

    @register_quantizer(READER)
    class Quantizer(HfQuantizer):
        requires_calibration = True

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            replace(model, self.quantization_config.stored)
            return model

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            finish(model)
            return model

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False
