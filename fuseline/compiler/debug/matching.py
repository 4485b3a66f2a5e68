"""Which item of one graph is which of another: a matching by structure, never by name.

An unmatched item is known by *keys* made of what is already matched around it: its op with all its inputs, with all its
users, with one of either. Where a key has exactly one bearer in each graph, the two are the same item, and the
neighbours of both learn a key. Strong keys go first; a weaker one is asked only when no stronger one is left. Bearers
of one key that nothing tells apart are told apart by what follows from them, then by module path and line, then by
their order. The work is linear in the edges, but for such groups.

Source: anchors and propagation as in patience diff and in GumTree (Falleri et al., 2014, "Fine-grained and accurate
source code differencing"), carried from trees to graphs with values of several users.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from ..provenance import makers, module_path, source_line
from .inlined import Item

Key = tuple[Any, ...]  # strength, then what is known
# Strength of keys, the strongest first. "same" keys hold the op with its literal arguments, "kind" keys the op alone,
# "place" keys only where a value comes from or goes to. "Here" is the module path.
SAME_INPUTS_HERE, EQUALLY_MANY, SAME_WEIGHT_HERE, SAME_USERS, SAME_INPUTS, SAME_USER, SAME_INPUT_HERE = range(7)
KIND_INPUTS, KIND_USERS, KIND_USER, KIND_INPUT_HERE = range(14, 18)
ALIKE = 7  # several bearers of one of the above: after the unique ones
PLACE_USERS, PLACE_INPUTS = 30, 31
DEPTHS = (99, 4, 1)  # how far alike ones are followed to their users, to tell them apart
TOGETHER = 64  # so many bearers that nothing tells apart are matched in order all at once


def match(first: Sequence[Item], second: Sequence[Item]) -> dict[Item, Item]:
    """Pairs of one item of each graph; the same pairs, reversed, when the graphs are exchanged."""
    a, b = _lines(first), _lines(second)
    if a == b:
        return dict(zip(first, second, strict=True))
    if (len(a), a) > (len(b), b):  # one of the two directions serves both
        return {x: y for y, x in _Matcher(second, first).run().items()}
    return _Matcher(first, second).run()


def _lines(items: Sequence[Item]) -> list[tuple[str, list[int]]]:
    return [(i.label, [source.index for source in i.inputs]) for i in items]


class _Matcher:
    def __init__(self, first: Sequence[Item], second: Sequence[Item]):
        self.sides = (first, second)
        self.partner: dict[Item, Item] = {}
        self.token: dict[Item, int] = {}
        self.bearers: dict[Key, tuple[dict[Item, None], dict[Item, None]]] = {}
        self.keys: dict[Item, list[Key]] = {}
        self.heap: list[tuple[int, int, Key]] = []
        self.serial = 0
        self.replaced: set[int] = set()
        self.side = dict.fromkeys(first, 0) | dict.fromkeys(second, 1)
        self.contexts: dict[int, dict[Item, int]] = {}
        self.paths: dict[Item, str] = {}

    def run(self) -> dict[Item, Item]:
        touched: list[Key] = []
        for items in self.sides:
            for item in items:
                if item.kind == "output":
                    self._bear(item, (SAME_INPUTS_HERE, item.kind, ()), touched)
                elif not item.inputs:
                    self._bear(item, (SAME_INPUTS_HERE, item.label, (), self._path(item)), touched)
                    self._bear(item, (SAME_INPUTS, item.label, ()), touched)
                elif not item.users:
                    self._bear(item, (SAME_USERS, item.label, ()), touched)
        self._propose(touched)
        while self.heap:
            strength, _, key = heapq.heappop(self.heap)
            ours, theirs = self.bearers[key]
            if not ours or not theirs:
                continue
            if len(ours) == len(theirs) == 1:
                self._pair(next(iter(ours)), next(iter(theirs)))
            elif strength == key[0]:
                self._wait(key)
            elif strength == EQUALLY_MANY and len(ours) != len(theirs):
                heapq.heappush(self.heap, (key[0] + ALIKE, self.serial, key))
            else:
                for x, y in list(self._told_apart(key, list(ours), list(theirs))):
                    self._pair(x, y)
        return self.partner

    def _bear(self, item: Item, key: Key, touched: list[Key]) -> None:
        bearers = self.bearers.get(key)
        if bearers is None:
            bearers = self.bearers[key] = ({}, {})
        bearers[self.side[item]][item] = None
        self.keys.setdefault(item, []).append(key)
        touched.append(key)

    def _propose(self, touched: Sequence[Key]) -> None:
        for key in dict.fromkeys(touched):
            ours, theirs = self.bearers[key]
            if ours and theirs:
                self.serial += 1
                heapq.heappush(self.heap, (key[0], self.serial, key))

    def _wait(self, key: Key) -> None:
        """Several bear the key: it is asked again when no unique one of its rank is left."""
        if key[0] < PLACE_USERS:
            ours, theirs = self.bearers[key]
            equally = key[0] == SAME_INPUTS_HERE and len(ours) == len(theirs)
            self.serial += 1
            heapq.heappush(self.heap, (EQUALLY_MANY if equally else key[0] + ALIKE, self.serial, key))

    def _pair(self, x: Item, y: Item) -> None:
        self.partner[x] = y
        self.token[x] = self.token[y] = len(self.partner)
        touched: list[Key] = []
        for item in (x, y):
            for key in self.keys.pop(item, ()):
                self.bearers[key][self.side[item]].pop(item, None)
                touched.append(key)
        if x.kind != y.kind:
            self.replaced.add(self.token[x])
        for item in (x, y):
            for user, slot in item.users:
                if user not in self.token:
                    self._learn_from_inputs(user, item, slot, touched)
            for slot, source in enumerate(item.inputs):
                if source not in self.token:
                    self._learn_from_users(source, item, slot, touched)
        self._propose(touched)

    def _learn_from_inputs(self, item: Item, known: Item, slot: int, touched: list[Key]) -> None:
        token, path = self.token[known], self._path(item)
        self._bear(item, (SAME_INPUT_HERE, item.label, slot, token, path), touched)
        self._bear(item, (KIND_INPUT_HERE, item.kind, slot, token, path), touched)
        if known.is_weight:
            self._bear(item, (SAME_WEIGHT_HERE, item.label, slot, token, path), touched)
        tokens = tuple(self.token.get(source, 0) for source in item.inputs)
        if all(tokens):
            self._bear(item, (SAME_INPUTS_HERE, item.label, tokens, path), touched)
            self._bear(item, (SAME_INPUTS, item.label, tokens), touched)
            self._bear(item, (KIND_INPUTS, item.kind, tokens), touched)
            self._bear(item, (PLACE_INPUTS, tokens, path, len(item.users)), touched)

    def _learn_from_users(self, item: Item, known: Item, slot: int, touched: list[Key]) -> None:
        token = self.token[known]
        if token not in self.replaced:  # else the positions among the inputs mean different things
            self._bear(item, (SAME_USER, item.label, slot, token), touched)
            self._bear(item, (KIND_USER, item.kind, slot, token), touched)
        tokens = tuple(sorted((self.token.get(user, 0), position) for user, position in item.users))
        if all(token for token, _ in tokens):
            self._bear(item, (SAME_USERS, item.label, tokens), touched)
            self._bear(item, (KIND_USERS, item.kind, tokens), touched)
            if not any(token in self.replaced for token, _ in tokens):
                self._bear(item, (PLACE_USERS, tokens), touched)

    def _told_apart(self, key: Key, ours: list[Item], theirs: list[Item]) -> Iterator[tuple[Item, Item]]:
        """Pairs among the bearers of one key, by the first question that tells some of them apart."""
        questions: list[Callable[[Item], Any]] = [partial(self._context, depth) for depth in DEPTHS]
        questions += [lambda i: (self._path(i), *_origin(i)), self._path]
        if key[0] in (SAME_INPUTS_HERE, SAME_INPUTS, SAME_USERS, KIND_USERS):
            questions.append(lambda i: None)
        for question in questions:
            groups: dict[Any, tuple[list[Item], list[Item]]] = {}
            for position, items in enumerate((ours, theirs)):
                for item in items:
                    groups.setdefault(question(item), ([], []))[position].append(item)
            shared = [(x, y) for x, y in groups.values() if x and y]
            unique = [(x[0], y[0]) for x, y in shared if len(x) == len(y) == 1]
            if unique:
                yield from unique
                return
            if shared:
                x, y = shared[0]
                yield from zip(x, y, strict=False) if len(x) > TOGETHER else [(x[0], y[0])]
                return

    def _context(self, depth: int, item: Item) -> int:
        """A hash of what is computed from an item, so many users away."""
        known = self.contexts.setdefault(depth, {})
        if depth == DEPTHS[0] and not known:  # all of it, in one pass
            for items in self.sides:
                for one in reversed(items):
                    known[one] = hash((one.label, *sorted((known[user], slot) for user, slot in one.users)))
        if item not in known:
            further = sorted((self._context(depth - 1, u), slot) for u, slot in item.users) if depth else ()
            known[item] = hash((item.label, *further))
        return known[item]

    def _path(self, item: Item) -> str:
        found = self.paths.get(item)
        if found is None:
            found = self.paths[item] = module_path(item.node)
        return found


def _origin(item: Item) -> tuple[Any, ...]:
    return source_line(item.node), makers(item.node)
