"""The values that a reproducer needs: none at all, else random ones, else the real ones; whichever reproduces first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, nearest
from ..stage import Recipe
from ..stage.tensors import EMBEDDED_BYTES, example_bytes
from .check import Verdict
from .culprit import Judge as Checker, renewed
from .reduce import failing
from .reproducer import load_reproducer, write_reproducer
from .search import Case

VALUES = ("none", "random", "real")
SEEDS = (0, 1, 2)
BESIDE_BYTES = 64 << 20  # of real values, in a file beside the reproducer, where nobody asked for them


def recipes(case: Case, verdict: Verdict, path: Path, values: str | None = None) -> Iterator[Recipe]:
    """The recipes to try, the smallest first.

    Args:
        values: "none", "random" or "real" alone, the last of any size; None: all that can do.

    Raises:
        UserError: values were asked for, and the program has none.
    """
    if values not in (None, *VALUES):
        raise UserError(f"values cannot be '{values}'{nearest(values, VALUES)}")
    program = case.program
    if values == "none" or (values is None and (verdict.kind != "error" or program.examples is None)):
        yield Recipe("none")
    if program.examples is None:
        if values in ("random", "real"):
            raise UserError(f"there are no {values} values: the program has types only")
        return
    if values in (None, "random"):
        yield from (Recipe("random", seed) for seed in SEEDS)
    size = example_bytes(program)
    if values == "real" or (values is None and size <= BESIDE_BYTES):
        yield Recipe("embedded") if size <= EMBEDDED_BYTES else Recipe("file", name=f"{path.stem}.safetensors")


def settle(
    path: Path,
    case: Case,
    check: Checker,
    verdict: Verdict,
    scope: str,
    values: str | None = None,
    repeat: int = 1,
) -> Recipe | None:
    """Writes the smallest reproducer that fails alike when it is read back here; None, and no file, if none does."""
    for recipe in recipes(case, verdict, path, values):
        write_reproducer(path, case.program, case.pipeline, str(check), verdict, recipe, scope, repeat)
        found = _again(path, check, verdict, repeat)
        if found is not None:
            if found != verdict:
                write_reproducer(path, case.program, case.pipeline, str(check), found, recipe, scope, repeat)
            return recipe
        discard(path, recipe)
    return None


def write_case(path: Path, case: Case, check: str, verdict: Verdict, repeat: int = 1, beside: bool = False) -> None:
    """Writes a case as it is, while a search goes on: with its values in the text where they are few.

    beside: many values go into a file beside it; otherwise random ones stand for them.
    """
    program, size = case.program, example_bytes(case.program)
    recipe = Recipe("none")
    if program.examples is not None:
        many = Recipe("file", name=f"{path.stem}.safetensors") if beside else Recipe("random")
        recipe = Recipe("embedded") if size <= EMBEDDED_BYTES else many
    write_reproducer(path, program, case.pipeline, check, verdict, recipe, "reduced", repeat)


def discard(path: Path, recipe: Recipe) -> None:
    """Removes a reproducer and its values."""
    path.unlink(missing_ok=True)
    if recipe.kind == "file":
        (path.parent / recipe.name).unlink(missing_ok=True)


def _again(path: Path, check: Checker, verdict: Verdict, repeat: int) -> Verdict | None:
    try:
        read = load_reproducer(path)
        return failing(renewed(check), Case(read.program, read.pipeline), verdict, repeat)
    except Exception:  # what is read back does not even run
        return None
