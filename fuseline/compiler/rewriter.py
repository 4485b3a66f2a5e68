"""Rewriter: the only way to add, replace or erase nodes.

It computes `val` for what it creates, passes provenance on, and opens an Action for each rewrite.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import sites as _sites
from .action import Action, Observer, PassEnds
from .compat import on_fake_values
from .errors import VerificationError
from .expressions import Expression
from .order import touches_written, writes
from .outline import Cut
from .pattern import Match
from .plan import SitePlan
from .program import TRAINS, Program
from .provenance import add_maker, inherit, source_line
from .rule import Rule
from .structure import describe_value


class Builder:
    """Creates the nodes of one rewrite. Calling it makes a node: `new(torch.ops.aten.add.Tensor, a, b)`."""

    def __init__(
        self,
        program: Program,
        before: Node,
        origins: Sequence[Node],
        maker: str,
        weights: dict[Expression, Node],
        types: dict[Any, Any],
    ):
        self._program, self._before, self._origins, self._maker = program, before, origins, maker
        self._weights, self._types = weights, types
        self.created: list[Node] = []

    @property
    def trains(self) -> bool:
        """Whether the program is one to train through (`program.TRAINS`)."""
        return TRAINS in self._program.state

    def at(self, node: Node) -> Builder:
        """From here on, nodes are created before `node`."""
        self._before = node
        return self

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call of `target`; its fake value is computed from its arguments'."""
        target = getattr(target, "overload", target)
        with self._inserting():
            node = self._program.graph.call_function(target, args, kwargs)
        node.meta["val"] = fake_call(self._program, target, args, kwargs, self._before.meta.get("autocast", ()))
        return self._finish(node)

    def weight(self, expression: Expression) -> Node:
        """A weight node for an expression over the program's parameters; the one there is, if there is one."""
        known = self._weights.get(expression)
        if known is not None and not known._erased:
            return known
        program = self._program
        base = "_".join([*(_sites.identifier(p) for p in expression.parameters()[:1]), _label(expression)])
        name, serial = base, 1
        while hasattr(program.module, name):
            name, serial = f"{base}_{serial}", serial + 1
        value = fake_weight(program, expression, self._types)
        program.module.register_buffer(name, value, persistent=False)
        body = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
        with program.graph.inserting_before(body):
            node = program.graph.get_attr(name)
        node.meta.update(val=value, weight=expression)
        self._weights[expression] = node
        return self._finish(node)

    def region(self, name: str, region: Cut) -> dict[Node, Node]:
        """A call of a region, under a fresh name that starts with `name`; what replaces each of its outputs."""
        for node in region.module.graph.nodes:
            if node.op == "call_function":
                add_maker(node, self._maker)
        values = [n.meta["val"] for n in region.outputs]
        call = self._call_module(name, region.module, region.inputs, values[0] if len(values) == 1 else tuple(values))
        if len(region.outputs) == 1:
            return {region.outputs[0]: call}
        return {old: self(operator.getitem, call, i) for i, old in enumerate(region.outputs)}

    def _call_module(self, name: str, module: GraphModule, args: Sequence[Node], val: Any) -> Node:
        target, serial = f"{name}_0", 0
        while hasattr(self._program.module, target):
            serial += 1
            target = f"{name}_{serial}"
        self._program.module.add_submodule(target, module)
        with self._inserting():
            node = self._program.graph.call_module(target, tuple(args))
        node.meta["val"] = val
        return self._finish(node)

    def _inserting(self) -> AbstractContextManager[Any]:
        return self._program.graph.inserting_before(self._before)

    def _finish(self, node: Node) -> Node:
        inherit(node, self._origins, self._maker)
        self.created.append(node)
        return node


class Rewriter:
    """Applies rules to one program on behalf of one pass."""

    def __init__(self, program: Program, pass_name: str, observers: Sequence[Observer] = (), first_number: int = 1):
        self.program, self.pass_name, self.observers = program, pass_name, observers
        self.next_number = first_number
        self.matched: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.skipped = 0
        self.excused: str | None = None  # why this program needs no rewrite, where the pass knows
        self._weights: dict[Expression, Node] = {n.meta["weight"]: n for n in program.weights()}
        self._types: dict[Any, Any] = {}
        self.site_of: dict[Node, str] = _sites.sites(program.graph)
        self.decisions: Mapping[str, SitePlan] = {}

    def decision(self, node: Node) -> SitePlan | None:
        """What the pass's analysis decided for this node's site; None, and a recorded refusal, where it knows none."""
        found = self.decisions.get(self.site(node))
        if found is None:
            self.refuse(node, "the plan has no decision for this site")
        return found

    def apply_all(self, rules: Iterable[Rule]) -> None:
        """Applies each rule everywhere it fits, in order."""
        for rule in rules:
            with contextlib.ExitStack() as watching:
                for observer in self.observers:
                    watching.enter_context(observer.applying(rule, self.program))
                self._apply_everywhere(rule)

    def _apply_everywhere(self, rule: Rule) -> None:
        for match in rule.matches(self.program):
            if any(node._erased for node in match.nodes):
                continue
            reason = rule.refuse(match) or _overtaken(match)
            if reason is not None:
                known = self.refused.get(self.site(match.root)) if rule.inner.settles else None
                self.refuse(match.root, f"{known}; {reason}" if known else reason)
            else:
                self.apply(rule, match)

    def apply(self, rule: Rule, match: Match) -> bool:
        """One rewrite by a rule."""
        site = self.site(match.root)
        done = self.rewrite(match.root, match.nodes, lambda new: rule.after(match, new), rule.name, rule)
        if done and rule.inner.settles:
            self.refused.pop(site, None)
        return done

    def refuse(self, node: Node, reason: str, what: str = "") -> None:
        """Records why a site was left alone; `what` of it, where a pass looks at several things there."""
        site = f"{self.site(node)} {what}".rstrip()
        self.refused[site] = reason
        for observer in self.observers:
            observer.refused(site, reason)

    def rewrite(
        self,
        root: Node,
        origins: Sequence[Node],
        build: Callable[[Builder], Node | dict[Node, Node]],
        rule: str,
        source: Rule | None = None,
        moved: Collection[Node] = (),
    ) -> bool:
        """Replaces `root` (or the keys of the mapping that `build` returns) and erases what becomes dead.

        moved: writes in place that what is built does itself; others stay.
        Returns False when an observer skipped the rewrite.

        Raises:
            VerificationError: the new value differs from the old in shape or dtype.
        """
        number, self.next_number = self.next_number, self.next_number + 1
        action = Action(number, self.pass_name, rule, self.site(root), tuple(origins), root, source or build)
        if not self._allowed(action):
            return False
        maker = f"{self.pass_name}/{rule}"
        new = Builder(self.program, root, list(origins) or [root], maker, self._weights, self._types)
        built = build(new)
        replacements = built if isinstance(built, dict) else {root: built}
        for old, replacement in replacements.items():
            self._check(old, replacement, action)
            old.replace_all_uses_with(replacement)
            self.site_of.setdefault(replacement, self.site(old))
        self._erase_dead([*replacements, *origins], moved)
        action.created, action.replaced = new.created, replacements
        self.matched[rule] = self.matched.get(rule, 0) + 1
        for observer in self.observers:
            observer.rewritten(action, self.program)
        return True

    def replace_all(self, root: Node, sites: Sequence[Node], build: Callable[[], GraphModule], rule: str) -> bool:
        """Puts another graph in the place of the program's own, as one rewrite: for passes that trace it again.

        root: a node of the old graph to name the rewrite by; sites: what the report counts.
        Returns False when an observer skipped the rewrite. What calls the new graph must give it the same arguments.
        """
        number, self.next_number = self.next_number, self.next_number + 1
        action = Action(number, self.pass_name, rule, self.site(root), tuple(sites), root, build)
        if not self._allowed(action):
            return False
        module = build()
        for node in module.graph.nodes:
            if node.op == "call_function":
                add_maker(node, f"{self.pass_name}/{rule}")
        self.program.module = module
        self._weights = {n.meta["weight"]: n for n in self.program.weights()}
        self.site_of = _sites.sites(module.graph)
        action.created = [n for n in module.graph.nodes if n.op == "call_function"]
        self.matched[rule] = self.matched.get(rule, 0) + len(sites)
        for observer in self.observers:
            observer.rewritten(action, self.program)
        return True

    def decide(self, node: Node, rule: str, why: str = "") -> bool:
        """An action that leaves the graph as it is and says something of a node (a tag); False where an observer
        skipped it. `why` is kept among the node's makers."""
        number, self.next_number = self.next_number, self.next_number + 1
        action = Action(number, self.pass_name, rule, self.site(node), (node,), node, self.decide)
        if not self._allowed(action):
            return False
        node.meta["custom"] = {**(node.meta.get("custom") or {}), "fuseline_why": why}
        add_maker(node, f"{self.pass_name}/{rule}")
        action.replaced = {node: node}
        self.matched[rule] = self.matched.get(rule, 0) + 1
        for observer in self.observers:
            observer.rewritten(action, self.program)
        return True

    def _allowed(self, action: Action) -> bool:
        try:
            if all(observer.allows(action) for observer in self.observers):
                return True
        except PassEnds:
            self.skipped += 1
            raise
        action.skipped = True
        self.skipped += 1
        return False

    def site(self, node: Node) -> str:
        """The name of a node's place, as plans and reports have it."""
        return self.site_of.get(node, node.name)

    def _check(self, old: Node, new: Node, action: Action) -> None:
        before, after = describe_value(old.meta.get("val")), describe_value(new.meta.get("val"))
        if before != after:
            raise VerificationError(
                f"rewrite {action} changes a value's type",
                [f"before: {before}  {old.format_node()}", f"after:  {after}", f"line:   {source_line(old)}"],
            )

    def _erase_dead(self, nodes: Iterable[Node], moved: Collection[Node]) -> None:
        """Erases these nodes and then whatever only they used, pure nodes only.

        A replaced node may draw random numbers (attention with its dropout at zero counts as such); a write stays.
        """
        pending = list(nodes)
        named = set(pending)
        while pending:
            node = pending.pop()
            if node._erased or node.users or node.op in ("placeholder", "output"):
                continue
            schema = getattr(node.target, "_schema", None)
            impure = node.is_impure() and node not in moved
            if impure and (node not in named or schema is None or schema.is_mutable):
                continue
            pending += node.all_input_nodes
            self.program.graph.erase_node(node)


def _overtaken(match: Match) -> str | None:
    """Why a match must stay: it reads, before its root, a storage that is written to on the way to the root.

    What replaces a match runs at the root's place, so such a read would come after the write.
    """
    readers = [n for n in match.nodes if n is not match.root and touches_written(n)]
    node = min(readers, default=match.root)
    while node is not match.root:
        node = node.next
        if node is not match.root and writes(node):
            line = source_line(node) or node.name
            return f"what it reads is written to before its result is used, by {node.target} at {line}"
    return None


def fake_call(program: Program, target: Callable[..., Any], args: Any, kwargs: Any, autocast: Any = ()) -> Any:
    """The fake result of a call, from its arguments' fake values, inside these regions of autocast."""
    fake_args, fake_kwargs = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with contextlib.ExitStack() as regions:
        regions.enter_context(on_fake_values(program.fake_mode))
        for region in autocast:
            regions.enter_context(torch.autocast(*region))
        return target(*fake_args, **fake_kwargs)


def fake_weight(program: Program, expression: Expression, known: dict[Any, Any]) -> torch.Tensor:
    """The fake value of a weight expression; `known` remembers types, since a model's layers repeat the same ones."""
    mode = program.fake_mode
    tensors = {name: program.sources[name].tensor for name in expression.parameters()}
    kinds = {name: f"{tuple(t.shape)} {t.dtype} {t.device}" for name, t in tensors.items()}
    key = expression.rename(kinds)
    with on_fake_values(mode):
        if key not in known:
            known[key] = expression.evaluate(lambda n: mode.from_tensor(tensors[n], static_shapes=True).detach())
        return torch.empty(known[key].shape, dtype=known[key].dtype, device=known[key].device)


def _label(expression: Expression) -> str:
    """A short word for what an expression does to its parameter: `codes`, `scale`, `cast`."""
    for inner in expression.walk():
        name = getattr(inner, "name", None)
        if type(inner).__name__ == "Output" and isinstance(name, str):
            return name
    return type(expression).__name__.lower()
