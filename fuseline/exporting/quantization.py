"""Quantized weights, inputs and caches of a model as compressed-tensors' `quantization_config`.

Linears of one scheme are a group. A reader finds them by the class, `Linear`, where there is one group, and by their
names where there are more; linears that were left alone are named under `ignore`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compiler.errors import UserError
from ..compiler.expressions import Decode, Dequantize, Expression, Output, Param
from ..compiler.program import Program
from ..compiler.schemes import Scheme
from ..compiler.weights import STORE
from ..models.coded import CodedLinear
from .codes import quantization, quantized_weights
from .compressed import DTYPES, FLOATS, Tensors, arguments, format_of, input_arguments, tensors
from .parameters import Assignment
from .unify import Mismatch, RoundedCache, Unified

METHOD = "compressed-tensors"
_CACHING = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
"""By one of these compressed-tensors knows an attention that fills a cache."""


@dataclass(frozen=True)
class Coded:
    """How a linear is written: the format's name, the schemes of its weight and of its input."""

    format: str
    weights: Scheme
    activations: Scheme | None

    def group(self, targets: list[str]) -> dict[str, Any]:
        return {
            "targets": targets,
            "weights": arguments(self.weights),
            "input_activations": None if self.activations is None else input_arguments(self.activations),
            "output_activations": None,
            "format": self.format,
        }


@dataclass
class Quantization:
    """What is written as codes.

    linears: how each linear is written, by its name; config: `quantization_config` without transforms; loaded: the
    linears of a model that was loaded over codes, which are written as they are.
    """

    linears: dict[str, Coded] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    loaded: dict[str, CodedLinear] = field(default_factory=dict)

    def tensors(self, assignment: Assignment, name: str) -> Tensors:
        """What a linear's `weight` is replaced by, by names in the state dict."""
        weight = assignment.values[f"{name}.weight"]
        made, coded = quantization(weight), self.linears[name]
        assert made is not None and isinstance(weight, (Dequantize, Decode))
        sources = [assignment.program.sources[n].tensor.detach() for n in weight.parameters()]
        memo: dict[Expression, Any] = {}
        parts = {part: STORE.evaluate(Output(made, part), sources, memo) for part in coded.weights.outputs}
        stored = tensors(coded.format, coded.weights, parts, parts["codes"].shape)
        return {f"{name}.{part}": tensor for part, tensor in stored.items()}


def refuse_others(model: torch.nn.Module, program: Program, rewritten: Program) -> None:
    """Holds what is quantized to weights of linears, which are what compressed-tensors' readers take.

    program: the captured one, whose sources are the model's tensors.

    Raises:
        UserError: the model's dtype, or stacked experts; Mismatch: a weight that is no linear's.
    """
    stacked = next((n for n, p in model.named_parameters() if p.dim() > 2 and ".experts." in n), None)
    if stacked is not None:
        raise UserError(
            f"'{stacked}' holds experts in one tensor, which `quantize` leaves as it is",
            ["transformers takes the experts of a compressed-tensors checkpoint to be quantized as its linears are"],
            "fuseline.save keeps quantized models, for fuseline.load",
        )
    for node in rewritten.graph.nodes:
        table = node.args[0] if node.target is torch.ops.aten.embedding.default else None
        if table is not None and quantization(table.meta.get("weight")) is not None:
            raise Mismatch(
                f"'{table.meta['weight'].parameters()[0]}' is quantized, and is looked up by its rows",
                ["codes are read by nn.Linear modules alone, and a head that is tied to the embedding is none"],
            )
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    for made in quantized_weights(rewritten):
        name = made.parameters()[0]
        owner = owners.get(id(program.sources[name].tensor))
        if not isinstance(owner, torch.nn.Linear):
            kind = "no module" if owner is None else type(owner).__name__
            raise Mismatch(
                f"'{name}' is quantized, and belongs to {kind}",
                ["compressed-tensors' readers take the weights of nn.Linear modules; skip=… leaves others as they are"],
            )
    if model.dtype not in DTYPES:
        raise UserError(
            f"the model is in {str(model.dtype).removeprefix('torch.')}, and its scales are float32",
            ["compressed-tensors multiplies with scales in the model's dtype, which would change the weights"],
            "--dtype bfloat16 or --dtype float32 (model.to(…) in Python)",
        )


def refuse_dtype(name: str, scheme: Scheme, dtype: torch.dtype) -> None:
    """Holds block formats to models in bfloat16, to which compressed-tensors expands them whatever the model is.

    Raises:
        UserError: the model is in another dtype.
    """
    if scheme.of.scaling != "real" and dtype != torch.bfloat16:
        raise UserError(
            f"'{name}' has codes of {scheme.format}, and the model is in {str(dtype).removeprefix('torch.')}",
            ["compressed-tensors expands these codes to bfloat16, and multiplies with inputs in the model's dtype"],
            "--dtype bfloat16 (model.to(…) in Python)",
        )


def describe(model: torch.nn.Module, program: Program, unified: Unified, assignment: Assignment) -> Quantization:
    """The configuration of what is quantized.

    Raises:
        Mismatch: something that compressed-tensors has no word for.
    """
    weights = {n.removesuffix(".weight"): q.scheme for n, v in assignment.values.items() if (q := quantization(v))}
    inputs = _inputs(model, program, unified)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    alone = next((name for name in inputs if name not in weights), None)
    if alone is not None:
        raise Mismatch(f"the input of '{alone}' is rounded, and its weight is not: no format has that")
    found = Quantization()
    for name in names:
        if name in weights:
            refuse_dtype(name, weights[name], model.dtype)  # type: ignore[arg-type]
            found.linears[name] = coded(name, weights[name], inputs.get(name))
    cache = _cache(model, unified)
    if not found.linears and cache is None:
        return found
    found.config = configuration(found.linears, [n for n in names if n not in found.linears], cache)
    return found


def coded(name: str, weights: Scheme, inputs: Scheme | None) -> Coded:
    """How a linear is written.

    Raises:
        Mismatch: no format has such codes, or codes beside inputs that are rounded so.
    """
    format = format_of(weights, inputs)
    if format is None:
        beside = "" if inputs is None else f", beside inputs in {inputs}"
        raise Mismatch(
            f"'{name}' has codes of {weights}{beside}, for which compressed-tensors has no format",
            [f"it has integers, and {', '.join(FLOATS)}; integers beside integers, e4m3 beside e4m3"],
        )
    return Coded(format, weights, inputs)


def configuration(linears: dict[str, Coded], ignore: list[str], cache: dict[str, Any] | None) -> dict[str, Any]:
    """`quantization_config` of linears by their names; ignore: linears that have no codes."""
    kinds: dict[Coded, list[str]] = {}
    for name, one in linears.items():
        kinds.setdefault(one, []).append(name)
    formats = [*dict.fromkeys(one.format for one in kinds)]
    groups = [one.group(["Linear"] if len(kinds) == 1 else targets) for one, targets in kinds.items()]
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ignore,
        "kv_cache_scheme": cache,
    }


def without_rounding(config: dict[str, Any]) -> dict[str, Any] | None:
    """A `quantization_config` to load weights alone with, expanded at once; None where no weight is quantized."""
    groups = {
        name: {**group, "input_activations": None}
        for name, group in config.get("config_groups", {}).items()
        if group["weights"] is not None
    }
    left = {key: value for key, value in config.items() if key != "transform_config"}
    return {**left, "config_groups": groups, "kv_cache_scheme": None, "dequantize": True} if groups else None


def _inputs(model: torch.nn.Module, program: Program, unified: Unified) -> dict[str, Scheme]:
    """The schemes of linears' inputs, by the linears' names."""
    linears: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linears.setdefault(id(module.weight), []).append(name)
    found: dict[str, Scheme] = {}
    for one in unified.inputs:
        tensor = program.sources[one.weight.name].tensor if isinstance(one.weight, Param) else None
        names = linears.get(id(tensor))
        if names is None:
            raise Mismatch(f"the input of {one.site} is rounded, which is no nn.Linear")
        for name in names:
            if found.setdefault(name, one.scheme) != one.scheme:
                raise Mismatch(f"'{name}' is called with inputs that are rounded in several ways")
    return found


def _cache(model: torch.nn.Module, unified: Unified) -> dict[str, Any] | None:
    """`kv_cache_scheme`: one scheme for keys and values, of every attention."""
    kinds = {(one.keys, one.values, one.channels) for one in unified.caches}
    if not kinds:
        return None
    for one in unified.caches:
        _refuse_attention(model, one)
    if len(unified.caches) < unified.attentions:
        left = f"{unified.attentions - len(unified.caches)} of {unified.attentions} attentions are left as they are"
        raise Mismatch(f"keys and values are rounded, and {left}", ["kv_cache_scheme is one for the whole model"])
    (keys, values, channels), *others = kinds
    if others or keys is None or keys != values or (not keys.group and channels[0] != channels[1]):
        wanted = sorted({f"keys={k}, values={v} of {c[0]} and {c[1]} channels" for k, v, c in kinds})
        raise Mismatch("kv_cache_scheme is one scheme for keys and values of the whole model", wanted)
    if not keys.of.affine:
        raise Mismatch(f"keys and values are rounded to {keys}, and kv_cache_scheme is written for integers")
    return arguments(keys, channels[0])


def _refuse_attention(model: torch.nn.Module, one: RoundedCache) -> None:
    module = dict(model.named_modules()).get(one.module)
    known = module is not None and "attention" in type(module).__name__.lower()
    known = known and any(hasattr(module, name) for name in _CACHING)
    if not known or "past_key_values" not in inspect.signature(module.forward).parameters:  # type: ignore[union-attr]
        raise Mismatch(
            f"keys and values are rounded at {one.site}, and compressed-tensors finds no cache there",
            [f"it looks for attention modules with past_key_values and one of {', '.join(_CACHING)}"],
        )
