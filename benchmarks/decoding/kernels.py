"""What each kernel of a compiled step reads, writes and computes: the manifest's buffers, each region's own shapes.

Bytes are those that the kernel cannot do without: every buffer once, of the cache the positions so far. Memory that
only the kernels of one region share is left out: it stays in the L2. FLOPs are the region's products and attention,
given to that of its kernels that reads most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fuseline.codegen.lower import lower
from fuseline.codegen.manifest import manifest_of
from fuseline.compiler.costs import cost


@dataclass
class Use:
    """What one launch of a kernel does, the mean over the regions that launch it; serves: the ops of the first one."""

    bytes: float
    flops: float
    serves: str


def used(compilation: Any, length: int, capacity: int) -> dict[str, Use]:
    """Kernel's name → its use in a step over `length` cached positions of a cache of `capacity` slots.

    It has every kernel of the program, also those of several that a region may choose from.
    """
    program = compilation.program
    manifest = manifest_of(compilation.path) if compilation.path else lower(program).manifest()
    symbols = {name: length if hint == capacity else hint for name, hint in hints(program).items()}
    modules = dict(program.graph.owning_module.named_modules())
    found: dict[str, list[tuple[int, int]]] = {}
    serves: dict[str, str] = {}
    shared = {kernel["name"]: kernel for kernel in manifest["kernels"]}
    for region in manifest["regions"]:
        moved = {name: bytes_of(shared[name], region, symbols) for name in region["kernels"]}
        flops = products(modules.get(region["name"])) + attended(region, symbols)
        most = max(moved.values(), default=0)
        for name, count in moved.items():
            found.setdefault(name, []).append((count, flops if count * 2 > most else 0))
            serves.setdefault(name, told(region))
    mean = lambda values: sum(values) / len(values)
    return {
        name: Use(mean([b for b, _ in uses]), mean([f for _, f in uses]), serves[name]) for name, uses in found.items()
    }


def hints(program: Any) -> dict[str, int]:
    """Size symbol → the size that it had at capture."""
    shapes = [v.shape for node in program.placeholders if isinstance(v := node.meta.get("val"), torch.Tensor)]
    return {str(s): int(s.node.hint or 0) for shape in shapes for s in shape if isinstance(s, torch.SymInt)}


def bytes_of(kernel: Mapping[str, Any], region: Mapping[str, Any], symbols: Mapping[str, int]) -> int:
    """Bytes that a kernel reads and writes in one region, each value once."""
    values = {value["name"]: value for value in (*region["inputs"], *region["outputs"])}
    names = region["buffers"].get(kernel["name"], {})
    distinct = {}
    for use in kernel["buffers"]:
        if not use["scratch"]:
            name = names.get(use["argument"], use["value"])
            distinct[name, use["access"]] = values.get(name, use)
    return sum(size(value, symbols) for value in distinct.values())


def size(value: Mapping[str, Any], symbols: Mapping[str, int]) -> int:
    """Bytes of a tensor that the manifest describes; 0 where a size is a formula."""
    if value.get("dtype") is None:
        return 0
    return elements(value["shape"], symbols) * getattr(torch, value["dtype"]).itemsize


def elements(shape: list[int | str], symbols: Mapping[str, int]) -> int:
    return math.prod(s if isinstance(s, int) else symbols.get(s, 0) for s in shape)


def products(region: Any) -> int:
    """FLOPs of a region's matrix products, where its sizes are numbers."""
    if region is None or not hasattr(region, "graph"):
        return 0
    counts = [cost(node).products for node in region.graph.nodes]
    return sum(count for count in counts if isinstance(count, int))


def attended(region: Mapping[str, Any], symbols: Mapping[str, int]) -> int:
    """FLOPs of a region's attention: two products of every query with every position."""
    uses = {argument: value for names in region["buffers"].values() for argument, value in names.items()}
    values = {value["name"]: value for value in region["inputs"]}
    queries, keys = values.get(uses.get("q_ptr", "")), values.get(uses.get("k_ptr", ""))
    if queries is None or keys is None or "shape" not in keys:
        return 0
    return 4 * elements(queries["shape"], symbols) * elements([keys["shape"][-2]], symbols)


def told(region: Mapping[str, Any]) -> str:
    """The ops of a region in a few words, dialect and overload left out: "rms_norm, 3 linear"."""
    skipped = ("dequantize", "decode", "decode_words", "to", "view", "reshape")
    counts = Counter(node["op"].split(".")[1] for node in region["nodes"])
    return ", ".join(f"{n} {op}" if n > 1 else op for op, n in counts.items() if op not in skipped)


def table(launched: Mapping[str, Mapping[str, float]], uses: Mapping[str, Use], steps: int) -> list[dict[str, Any]]:
    """Rows of the kernels that were launched in `steps` steps: per launch bytes, FLOPs, microseconds and GB/s.

    Where no launch was seen, as without a GPU, those of all kernels that there are, without times.

    share_of_step: of the microseconds of all kernels together, which overlap where one starts before another ends.
    """
    total = sum(entry["us"] for entry in launched.values())
    said = lambda use: {"serves": use.serves, "bytes": use.bytes, "mb": use.bytes / 1e6, "flops": use.flops}
    if not launched:
        return [{"kernel": name, **said(use)} for name, use in uses.items()]
    together: dict[str, Counter[str]] = {}
    for name, entry in launched.items():
        together.setdefault(name if name in uses else short(name), Counter()).update(entry)
    rows = []
    for name, entry in together.items():
        row: dict[str, Any] = {
            "kernel": name,
            "launches": entry["count"] / steps,
            "us": entry["us"] / entry["count"],
            "share_of_step": entry["us"] / total,
        }
        if use := uses.get(name):
            row |= said(use) | {"gb_s": use.bytes / row["us"] / 1e3}
        rows.append(row)
    return rows


def short(name: str) -> str:
    """A kernel of somebody else's without its result, its template's and its own arguments."""
    return name.removeprefix("void ").partition("<")[0].partition("(")[0][:60]
