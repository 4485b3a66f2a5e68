"""Bits for the keys and values of each layer, under a budget of bytes: TaDA's search.

A greedy descent by measured errors gives the first choice, which random exchanges between two places then improve by
the model's own loss. Source: TaDA (Joshi et al., 2025), which draws whole assignments at random; bits of 2, 4 and 8.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from .compiler.errors import UserError

Bits = tuple[int, ...]


def search_bits(
    errors: Sequence[Mapping[int, float]],
    size: Callable[[int], float],
    budget: float,
    loss: Callable[[Bits], float] | None = None,
    trials: int = 0,
    seed: int = 0,
) -> Bits:
    """Bits for each place, such as the keys of a layer, whose sizes together are at most `budget`.

    Args:
        errors: for each place, what each choice of bits costs there alone, such as a relative squared error.
        size: of one place at these bits, in the unit of `budget`.
        loss: of a whole choice; asked `trials` times for exchanges of one step up here for one step down there.

    Raises:
        UserError: the budget is below the least bits everywhere.
    """
    ladders = [sorted(costs) for costs in errors]
    chosen = [ladder[-1] for ladder in ladders]
    total = lambda bits: sum(map(size, bits))
    least = total([ladder[0] for ladder in ladders])
    if least > budget:
        raise UserError(
            f"a budget of {budget:.4g} is below {least:.4g}, the least bits everywhere", remedy="a larger budget"
        )
    below = lambda i, bits: ladders[i][ladders[i].index(bits[i]) - 1]
    while total(chosen) > budget:
        lower = [i for i in range(len(chosen)) if chosen[i] > ladders[i][0]]

        def price(i: int) -> float:
            step = below(i, chosen)
            return (errors[i][step] - errors[i][chosen[i]]) / (size(chosen[i]) - size(step))

        cheapest = min(lower, key=price)
        chosen[cheapest] = below(cheapest, chosen)
    if loss is None or not trials:
        return tuple(chosen)
    draw, best = random.Random(seed), loss(tuple(chosen))
    for _ in range(trials):
        tried = list(chosen)
        up = [i for i in range(len(tried)) if tried[i] < ladders[i][-1]]
        if not up:
            break
        raised = draw.choice(up)
        tried[raised] = ladders[raised][ladders[raised].index(tried[raised]) + 1]
        while total(tried) > budget:
            down = [i for i in range(len(tried)) if i != raised and tried[i] > ladders[i][0]]
            if not down:
                break
            i = draw.choice(down)
            tried[i] = below(i, tried)
        if total(tried) <= budget and (value := loss(tuple(tried))) < best:
            chosen, best = tried, value
    return tuple(chosen)
