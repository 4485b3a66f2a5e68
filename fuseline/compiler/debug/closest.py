"""The closest fit of a pattern at a node, and the constraints that fail there.

The matcher itself is asked (`compiler/pattern.py`); a watcher lets it go on past a failure, once or twice, in every way
in which a person would: another op in the place of the expected one, an op too many or too few, another number, a
subtree that is something else. Of all ways the one is kept in which most of the pattern fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..pattern import Bindings, Call, Either, Misfit, Term, Through, Var, Watcher, follow
from ..provenance import module_path, source_line
from ..sites import op_name
from ..traits import arguments
from .pattern_text import Step, marked, text_of

WORTH = 0.25  # with less of the pattern a second look is not worth the time
MARGIN = 0.05  # by so much more of its pattern must a spelling fit to be preferred to an earlier one
_TRAIL, _FAILED = "\x00trail", "\x00failed"


@dataclass(frozen=True)
class Problem:
    """One constraint that fails: what was expected and found, and at which node of which module and line."""

    text: str
    node: str
    call: str
    module: str
    line: str | None


@dataclass(frozen=True)
class NearMiss:
    """The way in which a pattern fits best at one root.

    fits, parts: how many of the pattern's constraints (ops, options, numbers, values that must be equal) hold there.
    """

    root: Node
    problems: tuple[Problem, ...]
    fits: int
    parts: int
    pattern: str  # as pseudo-Python, in the spelling that fits best
    marks: str  # `^` under what does not fit
    nodes: tuple[Node, ...]  # inside, the root first
    at: tuple[Node, ...]  # where it fails

    @property
    def share(self) -> float:
        return self.fits / self.parts if self.parts else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "root": self.root.name,
            "module": module_path(self.root),
            "line": source_line(self.root),
            "fits": self.fits,
            "parts": self.parts,
            "pattern": self.pattern,
            "marks": self.marks,
            "nodes": [n.name for n in self.nodes],
            "problems": [vars(p) for p in self.problems],
        }


def closest(term: Term, root: Node, thorough: bool = False) -> NearMiss | None:
    """The best way to hold a pattern against a node; None if nothing fits.

    With one failure, or with two where these leave more of the pattern; `thorough` tries two however little one leaves.
    """
    one = _closest(term, root, 1)
    if one is None or not one.problems or (one.share < WORTH and not thorough):
        return one
    two = _closest(term, root, 2)
    return two if two is not None and two.share > one.share + MARGIN else one


def _closest(term: Term, root: Node, failures: int) -> NearMiss | None:
    best: tuple[float, int, list[Step], tuple[Node, ...]] | None = None
    for bindings, nodes in follow(term, root, {}, (), _Lenient(failures)):
        steps, failed = _steps(bindings), bindings.get(_FAILED, 0)
        fits, parts = _count(steps)
        share = fits / max(parts, 1)
        # Of spellings that fit about as well, the first is the one that a rule's author had in mind.
        if best is None or not failed or share > best[0] + MARGIN or (share > best[0] and failed < best[1]):
            best = share, failed, steps, nodes
            if not failed:
                break
    if best is None or not best[0]:
        return None
    _, _, steps, nodes = best
    fits, parts = _count(steps)
    problems = [s for s in steps if s.misfit is not None]
    pattern, marks = marked(steps)
    at = tuple(dict.fromkeys(_place(s, steps, root) for s in problems))
    told = tuple(_problem(s, steps, root) for s in problems)
    return NearMiss(root, told, fits, parts, pattern, marks, tuple(dict.fromkeys(nodes)), at)


def depth(term: Any) -> int:
    """How many ops lie between a pattern's root and its farthest leaf."""
    if isinstance(term, Call):
        operands = [o for item in term.operands for o in (item if isinstance(item, (list, tuple)) else (item,))]
        return 1 + max((depth(o) for o in operands), default=0)
    if isinstance(term, Either):
        return max(depth(t) for t in term.alternatives)
    return depth(term.x) + 1 if isinstance(term, Through) else 0


@dataclass
class _Lenient(Watcher):
    """Lets a match go on past `most` failures, and keeps the trail of what was held against what."""

    most: int

    def enters(self, term: Any, value: Any, bindings: Bindings) -> Bindings:
        return _after(bindings, Step(term, value))

    def fails(self, term: Any, value: Any, misfit: Misfit, bindings: Bindings) -> Bindings | None:
        if misfit.kind == "count":
            return None
        last = bindings[_TRAIL][1]
        if last.term is term and last.misfit is not None and last.misfit.kind == "op":
            return _after(bindings, Step(term, value, misfit)) if misfit.kind == "option" else None
        return self._failed(bindings, Step(term, value, misfit))

    def instead(self, term: Call, value: Any, bindings: Bindings, nodes: tuple[Node, ...]) -> Iterator[Any]:
        if bindings.get(_FAILED, 0) >= self.most:
            return
        if isinstance(value, Node) and nodes and op_name(value) not in term.ops and len(value.all_input_nodes) == 1:
            past = self._failed(bindings, Step(term, value, Misfit("extra", None, value)))
            if past is not None and value.op == "call_function":
                yield from follow(term, value.all_input_nodes[0], past, (*nodes, value), self)
        first, *rest = term.operands
        if isinstance(first, (Call, Either, Through)) and not any(isinstance(o, (Term, list)) for o in rest):
            past = self._failed(bindings, Step(term, value, Misfit("absent", term, value)))
            if past is not None:
                yield from follow(first, value, past, nodes, self)
        if nodes:
            past = self._failed(bindings, Step(term, value, Misfit("other", term, value), skipped=True))
            if past is not None:
                yield past, nodes

    def _failed(self, bindings: Bindings, step: Step) -> Bindings | None:
        failed = bindings.get(_FAILED, 0)
        return None if failed >= self.most else {**_after(bindings, step), _FAILED: failed + 1}


def _after(bindings: Bindings, step: Step) -> Bindings:
    return {**bindings, _TRAIL: (bindings.get(_TRAIL), step)}


def _steps(bindings: Bindings) -> list[Step]:
    steps, trail = [], bindings.get(_TRAIL)
    while trail is not None:
        trail, step = trail
        steps.append(step)
    return steps[::-1]


def _count(steps: Sequence[Step]) -> tuple[int, int]:
    """How many constraints hold, of how many."""
    fits = parts = 0
    bound: set[str] = set()
    for step in steps:
        if step.misfit is None:
            own = _own(step.term, bound)
            fits, parts = fits + own, parts + own
        elif step.misfit.kind == "extra":
            own = _own(step.term, set())
            fits, parts = fits - own, parts - own + 1
        elif step.skipped:
            fits -= _own(step.term, set())
            parts += _size(step.term, set(bound)) - _own(step.term, set())
        elif step.misfit.kind == "absent":
            fits -= _own(step.term, set())
            parts += _size(step.term.operands[1:], set(bound))
        elif step.misfit.kind == "written":
            parts += 1
        else:
            fits -= 1
    return fits, parts


def _own(term: Any, bound: set[str]) -> int:
    """The constraints of a term without its operands; a variable is one only where it is bound already."""
    if isinstance(term, Var):
        known = term.name in bound
        bound.add(term.name)
        return int(known)
    if isinstance(term, Call):
        return 1 + sum(_own(value, bound) if isinstance(value, Term) else 1 for value in term.options.values())
    return 0 if isinstance(term, (Either, Through)) else 1


def _size(term: Any, bound: set[str]) -> int:
    """All constraints of a term in its first spelling."""
    if isinstance(term, (list, tuple)):
        return sum(_size(t, bound) for t in term)
    if isinstance(term, Call):
        return _own(term, bound) + sum(_size(t, bound) for t in term.operands)
    if isinstance(term, Either):
        return _size(term.alternatives[0], bound)
    return _size(term.x, bound) if isinstance(term, Through) else _own(term, bound)


def _place(step: Step, steps: Sequence[Step], root: Node) -> Node:
    """The node to point at: the value itself, or the call that has it as an argument."""
    if isinstance(step.term, Call) and isinstance(step.value, Node) and step.value.op == "call_function":
        return step.value
    holders = [s.value for s in steps[: steps.index(step)] if isinstance(s.term, Call) and isinstance(s.value, Node)]
    return next((n for n in reversed(holders) if _has(n, step.value)), holders[-1] if holders else root)


def _has(node: Node, value: Any) -> bool:
    return any(argument is value or (not isinstance(value, Node) and argument == value) for argument in node.args)


def _problem(step: Step, steps: Sequence[Step], root: Node) -> Problem:
    node = _place(step, steps, root)
    return Problem(_sentence(step), node.name, call_text(node), module_path(node), source_line(node))


def _sentence(step: Step) -> str:
    misfit, term = step.misfit, step.term
    assert misfit is not None
    wanted, found = misfit.wanted, misfit.found
    if misfit.kind == "op":
        return f"expected op {' or '.join(wanted)}, found {op_name(found)}"
    if misfit.kind == "number":
        return f"expected the number {wanted!r}, found {_describe(found)}"
    if misfit.kind == "scalar":
        return f"expected a number for {misfit.name}, found {_describe(found)}"
    if misfit.kind == "variable":
        return f"variable {misfit.name} is bound to two different values ({_describe(wanted)} and {_describe(found)})"
    if misfit.kind == "option":
        return f"expected {misfit.name}={wanted!r}, found {found!r}"
    if misfit.kind == "written":
        return f"{found.name} is written to in place, or shares memory with what is"
    if misfit.kind == "extra":
        return f"op {op_name(found)} stands between, which the pattern does not have"
    if misfit.kind == "absent":
        return f"op {' or '.join(term.ops)} is missing"
    return f"expected {text_of(term)}, found {_describe(found)}"


def _describe(value: Any) -> str:
    if not isinstance(value, Node):
        return "nothing" if value is None else repr(value)
    if value.op == "placeholder":
        return f"the input {value.name}"
    return f"the weight {value.name}" if value.op == "get_attr" else value.name


def call_text(node: Node) -> str:
    """`pow_2 = pow(add_6, exponent=3)`."""
    if node.op != "call_function":
        return node.name
    schema = getattr(node.target, "_schema", None)
    defaults = {a.name: a.default_value for a in schema.arguments} if schema is not None else {}
    given = [
        str(v) if isinstance(v, Node) or k in ("other", "exponent") else f"{k}={v}"
        for k, v in arguments(node).items()
        if isinstance(v, (Node, list, tuple)) or v != defaults.get(k)
    ]
    return f"{node.name} = {op_name(node)}({', '.join(given)})"
