"""The public API is what `tests/public_api.txt` lists, name by name with signatures (docs/versions.md explains it).

A change that is meant shows in that file's diff: `python tests/test_public_api.py` writes it again, and CHANGELOG.md
says what changed. Options of passes are API as well: they are what pipelines and plans are written in.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import fuseline
from fuseline.compiler import registry
from fuseline.compiler.action import Observer

ROOT = Path(__file__).resolve().parents[1]
LISTED = Path(__file__).with_name("public_api.txt")
#: Modules whose `__all__`, or the names given here, are public.
MODULES: dict[str, tuple[str, ...] | None] = {
    "fuseline": None,
    "fuseline.backend": ("compile",),
    "fuseline.compiler.action": ("Action", "Observer"),
    "fuseline.compiler.expressions": ("Expression",),
    "fuseline.compiler.observe": None,
    "fuseline.compiler.ops": ("Kind", "find", "op"),
    "fuseline.compiler.pattern": ("Either", "Match", "Scalar", "Through", "Var", "call", "maybe_cast", "mean", "rsqrt",
                                  "square"),
    "fuseline.compiler.rewriter": ("Builder", "Rewriter"),
    "fuseline.doctor": ("Finding", "examine"),
    "fuseline.integrations": None,
    "fuseline.models": None,
    "fuseline.qat": None,
    "fuseline.schemas": ("load", "names", "path"),
}  # fmt: skip


def plain(text: object) -> str:
    """A signature without what differs between versions of Python: quotes around annotations, addresses, modules."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(text)).replace("'", "").replace('"', "")
    text = re.sub(r"<factory>|<function [^>]+>|<class ([^>]+)>", r"\1", text)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)


def signature(value: object) -> str:
    try:
        return plain(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""


def members(name: str, kind: type) -> Iterator[str]:
    """What a class adds of its own: public methods and properties."""
    watching = issubclass(kind, Observer) and kind is not Observer  # its methods are Observer's
    own = [] if watching else [c for c in kind.__mro__ if c.__module__.startswith("fuseline")]
    found = {n: v for c in reversed(own) for n, v in vars(c).items() if not n.startswith("_")}
    for member, value in sorted(found.items()):
        inner = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if inspect.isfunction(inner):
            yield f"{name}.{member}{signature(inner)}"
        elif isinstance(value, property):
            yield f"{name}.{member}"


def describe(name: str, value: object) -> Iterator[str]:
    if isinstance(value, type) and issubclass(value, enum.Enum):
        yield f"{name}: {', '.join(value.__members__)}"
    elif isinstance(value, type):
        yield f"{name}{signature(value)}"
        yield from members(name, value)
    else:
        yield f"{name}{signature(value)}"


def options(kind: type[fuseline.Pass]) -> str:
    shown = []
    for field in dataclasses.fields(kind):
        value = field.default.value if isinstance(field.default, enum.Enum) else field.default
        shown.append(f"{field.name}={value}")
    return f"{kind.name}{{{', '.join(shown)}}}"


def public() -> list[str]:
    lines: list[str] = []
    for module, names in MODULES.items():
        loaded = importlib.import_module(module)
        for name in sorted(names or loaded.__all__):
            lines += describe(f"{module}.{name}", getattr(loaded, name))
    own = [k for k in registry.available().values() if k.__module__.startswith("fuseline.")]
    return [*lines, *sorted(options(kind) for kind in own)]


def test_the_public_api_is_the_one_that_is_listed() -> None:
    listed, here = LISTED.read_text(encoding="utf-8").splitlines(), public()
    changes = list(difflib.unified_diff(listed, here, "listed", "here", lineterm="", n=0))
    assert not changes, (
        "the public API changed:\n" + "\n".join(changes) + "\nif it is meant: python tests/test_public_api.py, and say "
        "it in CHANGELOG.md; what goes is deprecated first (docs/versions.md)"
    )


def test_what_is_listed_is_documented() -> None:
    for module, names in MODULES.items():
        loaded = importlib.import_module(module)
        for name in names or loaded.__all__:
            assert (getattr(loaded, name).__doc__ or "").strip(), f"{module}.{name} has no docstring"


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(fuseline.__file__).parent / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_one_version_everywhere() -> None:
    text = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CITATION.cff")}
    version = re.escape(fuseline.__version__)
    assert re.search(rf'^version = "{version}"$', text["pyproject.toml"], re.MULTILINE)
    assert re.search(rf"^version: {version}$", text["CITATION.cff"], re.MULTILINE)
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?({version}|Unreleased)\]?", log, re.MULTILINE)


if __name__ == "__main__":
    LISTED.write_text("\n".join(public()) + "\n", encoding="utf-8")
