"""Lowering: a program with regions becomes one readable Python module on disk.

The module holds the kernels, a host function a region, and `call(inputs…)`. Regions that no template takes stay as
functions of ATen calls, with the reason above them. A manifest beside it maps every kernel to its ops, the passes that
made them, and the user's lines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ..compiler.expressions import Expression
from ..compiler.program import Program
from ..compiler.provenance import makers, source_lines
from .emitter import emit_region
from .kernel import Kernel, Launcher, Refusal
from .module_file import deduplicate, load_module, render, write_text
from .templates.attention import emit_attention
from .templates.linear import emit_linear

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Lowered:
    """A lowered program.

    source: the module's text; kernels: the distinct ones; refusals: region → why it runs through PyTorch;
    weights: the expressions of `call`'s trailing inputs.
    """

    source: str
    kernels: tuple[Kernel, ...]
    launchers: tuple[Launcher, ...]
    refusals: dict[str, str]
    weights: tuple[Expression, ...]
    regions: dict[str, GraphModule]

    def manifest(self) -> dict[str, Any]:
        """The versioned description of every kernel, as JSON data."""
        return {
            "version": MANIFEST_VERSION,
            "kernels": [
                {
                    "name": k.name,
                    "ops": list(k.ops),
                    "lines": list(k.lines),
                    "made_by": list(k.made_by),
                    "signature": k.signature,
                    "constants": k.constants,
                    "num_warps": k.num_warps,
                    "num_stages": k.num_stages,
                    "regions": [x.name for x in self.launchers if any(y.name == k.name for y in x.kernels)],
                }
                for k in self.kernels
            ],
            "eager": [{"region": region, "reason": reason} for region, reason in self.refusals.items()],
            "weights": [w.to_json() for w in self.weights],
        }

    def write(self, directory: Path) -> Path:
        """Writes `<digest>.py` and `<digest>.json`, atomically; returns the module's path."""
        path = directory / f"fuseline_{hashlib.sha256(self.source.encode()).hexdigest()[:16]}.py"
        write_text(path.with_suffix(".json"), json.dumps(self.manifest(), indent=1))
        write_text(path, self.source)
        return path

    def load(self, directory: Path) -> Callable[..., Any]:
        """The module's `call`, imported from its file."""
        return load_module(self.write(directory)).call


def lower(program: Program) -> Lowered:
    """Generates code for a program whose regions `fuse` has marked; other nodes run through PyTorch."""
    module, weights = program.lift()
    found: list[Launcher] = []
    refusals: dict[str, str] = {}
    regions: dict[str, GraphModule] = {}
    eager: list[str] = []
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        name = str(node.target)
        region = module.get_submodule(name)
        assert isinstance(region, GraphModule)
        regions[name] = region
        launcher = emit(region, function_name(name))
        if isinstance(launcher, Refusal):
            refusals[name] = launcher.reason
            eager.append(f"# runs through PyTorch: {launcher.reason}\n{_function(region, function_name(name))}")
        else:
            found.append(launcher)
    launchers = deduplicate(found)
    call = _function(module, "call")
    source = f"{_header(program, launchers, refusals)}\n{render(launchers, chr(10).join([*eager, call]))}"
    kernels = {k.name: k for launcher in launchers for k in launcher.kernels}
    return Lowered(source, tuple(kernels.values()), tuple(launchers), refusals, tuple(weights), regions)


def emit(region: GraphModule, name: str) -> Launcher | Refusal:
    """The kernels of one region, by its kind."""
    return _EMITTERS.get(region.meta.get("kind"), emit_region)(region, name)


_EMITTERS: dict[object, Callable[[GraphModule, str], Launcher | Refusal]] = {
    "linear": emit_linear,
    "attention": emit_attention,
}


def function_name(region: str) -> str:
    """The name of a region's host function; the region's own name is often that of a value."""
    return f"run_{region}"


def describe(region: GraphModule) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """A region's ops, source lines and makers."""
    nodes = [n for n in region.graph.nodes if n.op == "call_function"]
    ops = tuple(str(n.target) for n in nodes)
    return ops, source_lines(nodes), tuple(dict.fromkeys(m for n in nodes for m in makers(n)))


_HEADER = '''"""A lowered program: {kernels} kernels for {regions} regions, {eager} regions run through PyTorch.

Made by Fuseline from: {lines}
by: {makers}
`call` takes the graph's inputs, then its weights; see the manifest beside this file. It may be edited and run again.
"""

from math import inf, nan

from torch import device

import fuseline  # the dialect's ops
'''


def _header(program: Program, launchers: list[Launcher], refusals: dict[str, str]) -> str:
    nodes = list(program.graph.nodes)
    files = dict.fromkeys(line.rpartition(":")[0].rpartition("/")[2] for line in source_lines(nodes))
    return _HEADER.format(
        kernels=len({k.name for launcher in launchers for k in launcher.kernels}),
        regions=len(launchers),
        eager=len(refusals),
        lines=", ".join(files) or "unknown",
        makers=", ".join(dict.fromkeys(m for n in nodes for m in makers(n))) or "capture alone",
    )


def _function(module: GraphModule, name: str) -> str:
    """A graph as a plain function; calls of regions become calls of the module's functions."""
    source = module.graph.python_code("self").src
    source = source[source.index("def forward(self") :]
    source = re.sub(r"^def forward\(self(?:, )?", f"def {name}(", source)
    source = re.sub(r"\bself\.(\w+)\(", lambda m: f"{function_name(m[1])}(", source).rstrip()
    head, _, body = source.partition("\n")
    if len(head) > 120:  # one argument a line
        inside = head[head.index("(") + 1 : head.rindex(")")]
        head = f"def {name}(\n" + "".join(f"    {a.strip()},\n" for a in inside.split(",")) + "):"
    return f"{head}\n{body}"
