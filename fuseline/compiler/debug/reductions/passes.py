"""A smaller pipeline: the guilty pass alone on what the others left, fewer passes, default options."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ...pipeline import Pipeline
from ..search import Search, minimise


def localise(search: Search) -> bool:
    """The guilty pass alone, on the program just before it; else the pipeline up to it."""
    culprit = search.culprit
    if culprit is None:
        return False
    passes = search.best.pipeline.passes
    stage = culprit.stage if search.best.program.examples is not None else replace(culprit.stage, examples=None)
    if search.tries("the guilty pass alone", stage, Pipeline(passes[culprit.step : culprit.step + 1])):
        return True
    return culprit.step + 1 < len(passes) and search.tries(
        "up to the guilty pass", pipeline=Pipeline(passes[: culprit.step + 1])
    )


def drop_passes(search: Search) -> bool:
    """Fewer passes, in their order."""
    passes = search.best.pipeline.passes

    def test(kept: list[str]) -> bool:
        try:
            pipeline = Pipeline(passes[int(i)] for i in kept)
        except Exception:  # an order that is none
            return False
        return search.tries("without some passes", pipeline=pipeline)

    return minimise([str(i) for i in range(len(passes))], test)


def reset_options(search: Search) -> bool:
    """Options back to their defaults, one at a time."""
    taken = False
    for position, step in enumerate(search.best.pipeline.passes):
        for option in fields(step):
            passes = list(search.best.pipeline.passes)
            if getattr(passes[position], option.name) == option.default:
                continue
            try:
                default: dict[str, Any] = {option.name: option.default}
                passes[position] = replace(passes[position], **default)
                pipeline = Pipeline(passes)
            except Exception:  # a pass that does not take its defaults
                continue
            taken |= search.tries(f"{step.name} without {option.name}", pipeline=pipeline)
    return taken
