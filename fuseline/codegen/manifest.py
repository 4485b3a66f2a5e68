"""The manifest of a lowered program: every kernel's ops, the passes that made them, the user's lines, its buffers.

    describe(lowered)      the manifest as JSON data; `Lowered.write` puts it beside the module
    manifest_of(module)    the manifest of an emitted module that was loaded, or of its file

It depends on the program alone, not on what was compiled or found in a cache. Its form is published and versioned:
`fuseline/schemas/manifest-1.json`, where each field is described.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..compiler.errors import UserError
from ..compiler.provenance import makers, module_path, source_lines
from .about import qualified_op, short
from .kernel import BufferUse, Kernel, Launcher, function_name
from .sizes import size

if TYPE_CHECKING:
    from .lower import Lowered

VERSION = 1


def describe(lowered: Lowered) -> dict[str, Any]:
    """The manifest: kernels, the regions that launch them, what runs outside regions, symbols, files and weights."""
    launchers = {launcher.name: launcher for launcher in lowered.launchers}
    weights = [n for n in lowered.graph.nodes if n.op == "placeholder" and "weight" in n.meta]
    places = {n.name: k for k, n in enumerate(weights)}
    regions = []
    for node in _calls(lowered.graph, lowered.regions):
        region = lowered.regions[str(node.target)]
        regions.append(_region(node, region, launchers.get(function_name(str(node.target))), lowered.refusals, places))
    return {
        "version": VERSION,
        "module": digest(lowered.source),
        "kernels": [_kernel(kernel, regions, lowered) for kernel in lowered.kernels],
        "regions": regions,
        "eager": [{"region": region, "reason": reason} for region, reason in lowered.refusals.items()],
        "outside": [{"op": op, "count": count} for op, count in _outside(lowered.graph).items()],
        "symbols": _symbols(lowered.graph),
        "files": _files(lowered.regions.values()),
        "weights": [weight.to_json() for weight in lowered.weights],
    }


def _calls(graph: Graph, regions: dict[str, GraphModule]) -> Iterator[Node]:
    """The calls of regions, those inside of a leftover region before its own."""
    for node in graph.nodes:
        if node.op == "call_module":
            yield from _calls(regions[str(node.target)].graph, regions)
            yield node


def digest(source: str) -> str:
    """The SHA-256 of an emitted module's text, in hexadecimal."""
    return hashlib.sha256(source.encode()).hexdigest()


def manifest_of(module: ModuleType | str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest beside an emitted module, which is given loaded or by its path.

    Raises:
        UserError: there is none, it cannot be read, it has another version, or the module was edited after it.
    """
    path = Path(str(module.__file__) if isinstance(module, ModuleType) else module)
    beside = path.with_suffix(".json")
    remedy = "write the module again: fuseline kernels MODEL -p PIPELINE -o DIR"
    try:
        manifest = json.loads(beside.read_text(encoding="utf-8"))
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        missing = "manifest" if path.exists() else "emitted module"
        raise UserError(f"no {missing} at {error.filename}", [], remedy) from None
    except (OSError, ValueError) as error:
        raise UserError(f"the manifest {beside} cannot be read", [str(error)], remedy) from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        found = manifest.get("version") if isinstance(manifest, dict) else None
        raise UserError(f"{beside} is no manifest of version {VERSION}", [f"it says: {found!r}"], remedy)
    if manifest.get("module") != digest(text):
        edited = [f"{beside.name} is of another text"]
        raise UserError(f"{path.name} was edited after its manifest was written", edited, remedy)
    return manifest


def _kernel(kernel: Kernel, regions: list[dict[str, Any]], lowered: Lowered) -> dict[str, Any]:
    """One distinct kernel, with its ops and buffers in the first region that it serves."""
    served = [region for region in regions if kernel.name in region["kernels"]]
    first = served[0]
    graph = lowered.regions[first["name"]].graph
    nodes = {n.name: n for n in graph.nodes}
    uses = next(x.buffers for x in lowered.launchers if x.name == first["function"])[kernel.name]
    return {
        "name": kernel.name,
        "ops": [node["op"] for node in first["nodes"] if node["op"] in kernel.ops],
        "lines": list(kernel.lines),
        "made_by": list(kernel.made_by),
        "regions": [region["name"] for region in served],
        "buffers": [_buffer(use, nodes, kernel) for use in uses],
        "signature": dict(kernel.signature),
        "constants": dict(kernel.constants),
        "num_warps": kernel.num_warps,
        "num_stages": kernel.num_stages,
    }


def _buffer(use: BufferUse, nodes: dict[str, Node], kernel: Kernel) -> dict[str, Any]:
    described = {"argument": use.argument, "access": use.access, "value": use.value}
    if use.shape is not None:  # memory of the host function
        kind = {"fp32": "float32", "i32": "int32"}.get(kernel.signature[use.argument].lstrip("*"))
        return {**described, "dtype": kind, "shape": list(use.shape), "scratch": True}
    return {**described, **_value(nodes[use.value].meta["val"]), "scratch": False}


def _region(
    call: Node, region: GraphModule, launcher: Launcher | None, refusals: dict[str, str], places: dict[str, int]
) -> dict[str, Any]:
    """One region: where it stands in the model, its nodes, what goes in and out, and the kernels that it launches."""
    name = str(call.target)
    nodes = [n for n in region.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    given = [n for n in region.graph.nodes if n.op == "placeholder"]
    results = next(n for n in region.graph.nodes if n.op == "output").args[0]
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    inputs = []
    for placeholder, argument in zip(given, call.args, strict=True):
        outer = argument.name if isinstance(argument, Node) else None
        entry = {"name": placeholder.name, "argument": outer, **_value(placeholder.meta.get("val"))}
        inputs.append({**entry, "weight": places[outer]} if outer in places else entry)
    return {
        "name": name,
        "function": function_name(name),
        "kind": region.meta.get("kind"),
        "module": _common(module_path(n) for n in nodes),
        "kernels": [kernel.name for kernel in launcher.kernels] if launcher else [],
        "reason": refusals.get(name),
        "nodes": [
            {
                "name": n.name,
                "op": qualified_op(n),
                "module": module_path(n),
                "lines": [short(line) for line in source_lines([n])],
                "made_by": list(makers(n)),
            }
            for n in nodes
        ],
        "inputs": inputs,
        "outputs": [{"name": n.name, **_value(n.meta.get("val"))} for n in results if isinstance(n, Node)],
        "buffers": {
            kernel: {use.argument: use.value for use in uses}
            for kernel, uses in (launcher.buffers if launcher else {}).items()
        },
    }


def _value(value: Any) -> dict[str, Any]:
    """A tensor's dtype, shape and strides; a size's formula."""
    if isinstance(value, torch.Tensor):
        shape, strides = ([_size(s) for s in sizes] for sizes in (value.shape, value.stride()))
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape, "strides": strides}
    return {"size": _size(value)} if isinstance(value, (int, torch.SymInt)) else {"size": None}


def _size(value: int | torch.SymInt) -> int | str:
    found = size(value)
    return found if isinstance(found, int) else str(found)


def _outside(graph: Graph) -> dict[str, int]:
    """The ops that PyTorch runs between the regions, and how often."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    return dict(Counter(qualified_op(n) for n in nodes))


def _symbols(graph: Graph) -> dict[str, dict[str, Any]]:
    """Size symbol → the input and dimension that it is the size of."""
    found: dict[str, dict[str, Any]] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            for dimension, length in enumerate(node.meta["val"].shape):
                if isinstance(text := _size(length), str) and text.isidentifier():
                    found.setdefault(text, {"input": node.name, "dimension": dimension})
    return found


def _files(regions: Iterable[GraphModule]) -> dict[str, list[str]]:
    """File name, as `lines` has it → the paths of that name."""
    found: dict[str, dict[str, None]] = {}
    for region in regions:
        for line in source_lines(region.graph.nodes):
            path = line.rpartition(":")[0]
            found.setdefault(PurePath(path).name, {})[path] = None
    return {name: list(paths) for name, paths in found.items()}


def _common(paths: Iterable[str]) -> str:
    """The innermost module that holds all of them."""
    split = [path.split(".") for path in paths]
    return ".".join(parts[0] for parts in _while_equal(split)) if split else ""


def _while_equal(split: list[list[str]]) -> list[tuple[str, ...]]:
    together = list(zip(*split))
    ends = next((k for k, parts in enumerate(together) if len(set(parts)) > 1), len(together))
    return together[:ends]
