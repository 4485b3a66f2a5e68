"""A place in a program as a person names it: a site, a module, a node, or a line of code."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from torch.fx import Node

from ..errors import UserError
from ..program import Program
from ..provenance import module_path, source_lines
from ..sites import sites

_LINE = re.compile(r"(.+\.\w+):(\d+)")


@dataclass(frozen=True)
class Where:
    """Nodes by one name. kind: "site", "module", "node" or "line"."""

    text: str
    kind: str
    nodes: tuple[Node, ...]

    @property
    def whole(self) -> bool:
        """Whether it names a region in which several things may be found."""
        return self.kind in ("module", "line")

    def now(self, program: Program) -> Where:
        """The same place in a program that was rewritten since: a module's new nodes, a node without those erased."""
        if self.kind == "module":
            return Where(self.text, self.kind, _of_module(program, self.text))
        if self.kind == "line":
            return Where(self.text, self.kind, _of_line(program, self.text))
        return Where(self.text, self.kind, tuple(n for n in self.nodes if not n._erased))


def locate(program: Program, text: str) -> Where:
    """The nodes that `text` names: `model.layers.3.mlp/linear#2`, a module path, `linear_7` or `modeling.py:174`.

    Raises:
        UserError: nothing has that name; with what comes nearest.
    """
    by_site = {site: node for node, site in sites(program.graph).items()}
    if text in by_site:
        return Where(text, "site", (by_site[text],))
    inside = _of_module(program, text)
    if inside:
        return Where(text, "module", inside)
    named = {node.name: node for node in program.graph.nodes}
    if text in named:
        return Where(text, "node", (named[text],))
    if _LINE.fullmatch(text):
        at = _of_line(program, text)
        if at:
            return Where(text, "line", at)
    raise UserError(
        f"no site, module, node or line is called '{text}'{_nearest(program, text, list(by_site))}",
        remedy="a site (model.layers.3.mlp/mul#0), a module path, a node's name, or file.py:174",
    )


def _of_module(program: Program, path: str) -> tuple[Node, ...]:
    computing = (n for n in program.graph.nodes if n.op in ("call_function", "call_module"))
    return tuple(n for n in computing if f"{module_path(n)}.".startswith(f"{path}."))


def _of_line(program: Program, text: str) -> tuple[Node, ...]:
    """Nodes of a line; a folder may be left out."""

    def fits(line: str) -> bool:
        return line == text or line.replace("\\", "/").endswith(f"/{text}")

    return tuple(n for n in program.graph.nodes if any(map(fits, source_lines([n]))))


def _nearest(program: Program, text: str, known: list[str]) -> str:
    if match := _LINE.fullmatch(text):
        lines = {line for n in program.graph.nodes for line in source_lines([n])}
        numbers = {int(n) for file, _, n in (line.rpartition(":") for line in lines) if file.endswith(match[1])}
        around = sorted(numbers, key=lambda n: (abs(n - int(match[2])), n))[:3]
        return f"; of {match[1]} the program has the lines {', '.join(map(str, sorted(around)))} …" if around else ""
    modules = {module_path(n) for n in program.graph.nodes}
    modules |= {path[:i] for path in modules for i, c in enumerate(path) if c == "."}
    names = known if "/" in text else [*sorted(modules - {""}), *(n.name for n in program.graph.nodes)]
    ends = [name for name in names if name.endswith(f".{text}")][:2]
    close = ends or difflib.get_close_matches(text, names, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
