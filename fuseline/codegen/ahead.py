"""Loads one step ahead, in the lines of a program that walks over rows.

    pid = tl.program_id(0)                         row_ahead, x_ahead = those of pid
    while pid < …:                                 while pid < …:
        row = pid …                                    row = pid …
        x = tl.load(x_ptr + row …)              ──►    x = x_ahead
        y = f(x)                                       y = f(x)
        tl.store(…, y)                                 row_ahead, x_ahead = those of the next pid
        pid += tl.num_programs(0)                      tl.store(…, y)
                                                       pid += tl.num_programs(0)

The next row is then on its way while this one is worked on and written. It waits in registers, as read.
"""

from __future__ import annotations

import re

_ASSIGNED = re.compile(r"([A-Za-z_]\w*) = (.*)")
_WORD = re.compile(r"[A-Za-z_]\w*")


def ahead(body: list[str], after: int, rows: str) -> tuple[list[str], list[str]]:
    """(lines before the loop, lines of the loop) for a loop's `body`, whose first `after` lines precede the next loads.

    rows: how many values `pid` takes; the last one is read again rather than none. Loads that do not depend on `pid`
    stay where they are.
    """
    texts = {m[1]: m[2] for line in body if (m := _ASSIGNED.fullmatch(line))}
    moving: set[str] = set()
    for name, text in texts.items():
        if {"pid", *moving} & set(_WORD.findall(text)):
            moving.add(name)
    loads = [name for name in texts if name in moving and texts[name].startswith("tl.load(")]
    needed = _needed(loads, texts)
    if any(name in needed for name in loads):
        return [], body  # a load that reads where another one says
    still = [name for name in texts if name in needed - moving]
    shifted = [name for name in texts if name in needed & moving]

    def next_to(pid: str) -> list[str]:
        def place(text: str) -> str:
            return _WORD.sub(lambda m: pid if m[0] == "pid" else f"{m[0]}_ahead" if m[0] in shifted else m[0], text)

        return [
            f"{name}_ahead = {place(_split(texts[name])[0] if name in loads else texts[name])}"
            for name in shifted + loads
        ]

    head = [*(f"{name} = {texts[name]}" for name in still), *next_to("tl.program_id(0)")]
    kept: list[str] = []
    for k, line in enumerate(body):
        if k == after:
            kept += next_to(f"tl.minimum(pid + tl.num_programs(0), {rows} - 1)")
        m = _ASSIGNED.fullmatch(line)
        if m and m[1] in loads:
            kept.append(f"{m[1]} = {m[1]}_ahead{_split(m[2])[1]}")
        elif not m or m[1] not in still:
            kept.append(line)
    return head, kept


def _needed(loads: list[str], texts: dict[str, str]) -> set[str]:
    """The names on which the loads depend."""
    needed: set[str] = set()
    pending = list(loads)
    while pending:
        for word in _WORD.findall(texts[pending.pop()]):
            if word in texts and word not in needed:
                needed.add(word)
                pending.append(word)
    return needed


def _split(text: str) -> tuple[str, str]:
    """A load and what follows it: `tl.load(…)`, `.to(tl.float32)`."""
    depth = 0
    for k, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == ")" and depth == 0:
            return text[: k + 1], text[k + 1 :]
    raise ValueError(text)
