"""Recipes: names for whole pipelines, `w4a16`, wherever a pipeline's text is.

A recipe's name is an item of a pipeline like a pass's, without options, and stands for the passes of its own text:
`str(Pipeline("w4a16"))`, the reports and the plans show those.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """name: as in a pipeline's text; pipeline: what it stands for; summary: what it is for, in a line."""

    name: str
    pipeline: str
    summary: str


_known: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe) -> Recipe:
    """Adds a recipe under its name.

    Raises:
        ValueError: another recipe has the name.
    """
    if _known.setdefault(recipe.name, recipe) != recipe:
        raise ValueError(f"two recipes are called '{recipe.name}'")
    return recipe


def recipes() -> dict[str, Recipe]:
    """All recipes by name, in the order in which they were added."""
    return dict(_known)
