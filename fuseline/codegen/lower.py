"""Lowering: a program with regions becomes one readable Python module on disk.

The module holds the kernels, a host function a region, and `call(inputs…)`. Regions that no template takes stay as
functions of ATen calls, with the reason above them. A manifest beside it maps every kernel to its ops, the passes that
made them, and the user's lines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.fx import Graph, GraphModule

from ..compiler.expressions import Expression
from ..compiler.program import Program
from ..compiler.provenance import makers, source_lines
from .buffers import Planned, plan
from .dependent import dependent
from .emitter import emit_region
from .kernel import Kernel, Launcher, Refusal, function_name
from .leftovers import gather
from .manifest import describe
from .module_file import deduplicate, load_module, render, write_text
from .repack import repack
from .templates.append import emit_append
from .templates.attention import emit_attention
from .templates.cached import emit_cached
from .templates.linear import emit_linear
from .templates.moe import emit_moe
from .templates.sparse import emit_sparse


@dataclass(frozen=True)
class Lowered:
    """A lowered program.

    source: the module's text; kernels: the distinct ones; refusals: region → why it runs through PyTorch;
    weights: the expressions of `call`'s trailing inputs; graph: what `call` does, `regions` its calls of regions;
    leftovers: function → a region that Inductor may compile.
    """

    source: str
    kernels: tuple[Kernel, ...]
    launchers: tuple[Launcher, ...]
    refusals: dict[str, str]
    weights: tuple[Expression, ...]
    regions: dict[str, GraphModule]
    graph: Graph
    leftovers: dict[str, GraphModule] = field(default_factory=dict)

    def manifest(self) -> dict[str, Any]:
        """The versioned description of every kernel, as JSON data (`manifest.py`)."""
        return describe(self)

    def write(self, directory: Path) -> Path:
        """Writes `<digest>.py` and `<digest>.json`, atomically; returns the module's path."""
        path = directory / f"fuseline_{hashlib.sha256(self.source.encode()).hexdigest()[:16]}.py"
        write_text(path.with_suffix(".json"), json.dumps(self.manifest(), indent=1))
        write_text(path, self.source)
        return path

    def load(self, directory: Path) -> Callable[..., Any]:
        """The module's `call`, imported from its file."""
        return load_module(self.write(directory)).call


def lower(program: Program, leftovers: bool = False) -> Lowered:
    """Generates code for a program whose regions `fuse` has marked; other nodes run through PyTorch.

    leftovers: whether what no region takes is gathered into functions of its own, for Inductor.
    """
    module, weights = program.lift()
    weights = repack(module, weights)
    names = gather(replace(program, module=module)) if leftovers else []
    gathered = {name: _region(module, name) for name in names}
    found: list[Launcher] = []
    refusals: dict[str, str] = {}
    regions: dict[str, GraphModule] = {}
    eager: list[str] = []
    for name, region in _regions(module):
        function = function_name(name)
        regions[name] = region
        if name in gathered:
            title = f"# left over, for Inductor where that is faster: {region.meta['identity'][:16]}"
            eager.append(f"{title}\n{_function(region, function)}")
            continue
        launcher = emit(region, function)
        if isinstance(launcher, Refusal):
            refusals[name] = launcher.reason
            eager.append(f"# runs through PyTorch: {launcher.reason}\n{_function(region, function)}")
        else:
            found.append(launcher)
    launchers = deduplicate(found)
    by_function = {launcher.name: launcher for launcher in launchers}
    planned = plan(module, {name: by_function[f] for name in regions if (f := function_name(name)) in by_function})
    call = _function(module, "call", planned)
    text = render(launchers, "\n".join([*eager, *filter(None, [planned.source]), call]))
    source = f"{_header(program, launchers, refusals, planned)}\n{text}"
    kernels = {k.name: k for launcher in launchers for k in launcher.kernels}
    left = {function_name(name): region for name, region in gathered.items()}
    return Lowered(
        source, tuple(kernels.values()), tuple(launchers), refusals, tuple(weights), regions, module.graph, left
    )


def _regions(module: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    """The regions that a graph calls, those inside of leftovers before them."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            region = _region(module, str(node.target))
            yield from _regions(region)
            yield str(node.target), region


def _region(module: GraphModule, name: str) -> GraphModule:
    region = module.get_submodule(name)
    assert isinstance(region, GraphModule)
    return region


def emit(region: GraphModule, name: str) -> Launcher | Refusal:
    """The kernels of one region, by its kind."""
    launcher = _EMITTERS.get(region.meta.get("kind"), emit_region)(region, name)
    return launcher if isinstance(launcher, Refusal) else dependent(launcher)


_EMITTERS: dict[object, Callable[[GraphModule, str], Launcher | Refusal]] = {
    "linear": emit_linear,
    "append": emit_append,
    "attention": emit_attention,
    "cached": emit_cached,
    "sparse": emit_sparse,
    "experts": emit_moe,
}


_HEADER = '''"""A lowered program: {kernels} kernels for {regions} regions, {eager} regions run through PyTorch.

Made by Fuseline from: {lines}
by: {makers}
`call` takes the graph's inputs, then its weights; see the manifest beside this file. It may be edited and run again.
"""

from math import inf, nan

from torch import device

import fuseline  # the dialect's ops
{imports}'''


def _header(program: Program, launchers: list[Launcher], refusals: dict[str, str], planned: Planned) -> str:
    nodes = list(program.graph.nodes)
    files = dict.fromkeys(line.rpartition(":")[0].rpartition("/")[2] for line in source_lines(nodes))
    return _HEADER.format(
        kernels=len({k.name for launcher in launchers for k in launcher.kernels}),
        regions=len(launchers),
        eager=len(refusals),
        imports="from fuseline.runtime.arena import Plan\n" if planned.source else "",
        lines=", ".join(files) or "unknown",
        makers=", ".join(dict.fromkeys(m for n in nodes for m in makers(n))) or "capture alone",
    )


def _function(module: GraphModule, name: str, planned: Planned | None = None) -> str:
    """A graph as a plain function; calls of regions become calls of the module's functions."""
    planned = planned or Planned()
    source = module.graph.python_code("self").src
    source = source[source.index("def forward(self") :]
    source = re.sub(r"^def forward\(self(?:, )?", f"def {name}(", source)
    source = re.sub(r"\bself\.(\w+)\(([^()]*)\)", lambda m: _call(m[1], m[2], planned), source).rstrip()
    head, _, body = source.partition("\n")
    if len(head) > 120:  # one argument a line
        inside = head[head.index("(") + 1 : head.rindex(")")]
        head = f"def {name}(\n" + "".join(f"    {a.strip()},\n" for a in inside.split(",")) + "):"
    return "\n".join(filter(None, [head, planned.first_line, body]))


def _call(region: str, arguments: str, planned: Planned) -> str:
    return f"{function_name(region)}({', '.join(filter(None, [arguments, planned.keywords.get(region)]))})"
