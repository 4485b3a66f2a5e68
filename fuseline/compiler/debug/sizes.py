"""A program's inputs at other values of its symbolic sizes, made from the captured ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..compat import size_hint, symbol_bounds, symbolic_expression, symbols_in
from ..program import Program

Size = str


def other_sizes(program: Program) -> Iterator[Size]:
    """A few sizes besides the captured one, as text `s0=17`: small, odd, and one more than a power of two."""
    bounds = symbol_bounds(program.fake_mode)
    symbols = _input_symbols(program)
    for value in (3, 17, 33):
        parts = []
        for symbol in symbols:
            entry = bounds.get(symbol, {})
            if entry.get("low", 0) <= value <= entry.get("high", value) and value != entry.get("hint"):
                parts.append(f"{symbol}={value}")
        if symbols and len(parts) == len(symbols):
            yield ", ".join(parts)


def at_size(program: Program, size: Size) -> list[Any] | None:
    """The captured arguments, cut or repeated along their symbolic dimensions; None where a size cannot be had.

    Values of a repeated dimension go round: ids stay ids, positions stay positions.
    """
    assert program.examples is not None
    values = {name: int(value) for name, _, value in (part.partition("=") for part in size.split(", "))}
    flat = list(program.examples)
    for node, position in zip(program.placeholders, program.arguments, strict=True):
        value, fake = flat[position], node.meta["val"]
        if isinstance(fake, torch.SymInt):
            wanted = _evaluate(fake, values)
            if wanted is None:
                return None
            flat[position] = wanted
        elif isinstance(value, torch.Tensor):
            for dim, symbolic in enumerate(fake.shape):
                if isinstance(symbolic, torch.SymInt):
                    wanted = _evaluate(symbolic, values)
                    if wanted is None or (value.shape[dim] == 0 and wanted):
                        return None
                    value = value.index_select(dim, torch.arange(wanted, device=value.device) % value.shape[dim])
            flat[position] = value
    return flat


def _input_symbols(program: Program) -> list[str]:
    found: dict[str, None] = {}
    for node in program.placeholders:
        for symbol in symbols_in(node.meta["val"]):
            found[symbol] = None
    return list(found)


def _evaluate(value: Any, values: dict[str, int]) -> int | None:
    """A size's value where all its symbols are known."""
    expression = symbolic_expression(value)
    if isinstance(expression, int):
        return expression
    names = {str(symbol): symbol for symbol in expression.free_symbols}
    if not set(names) <= set(values):
        return size_hint(value) if not names else None
    result = int(expression.subs({symbol: values[name] for name, symbol in names.items()}))
    return result if result >= 0 else None
