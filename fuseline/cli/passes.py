"""`fuseline passes [NAME]`: which passes and recipes there are; with a name, its page."""

from __future__ import annotations

import dataclasses
import enum
import typing
from typing import Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.output import Output
from fuseline.cli.render import following, table
from fuseline.compiler import framework, registry
from fuseline.compiler.option_help import comments
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.recipes import recipes


def passes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this pass's page, or recipe.")] = None,
    json: options.Json = None,
) -> None:
    """List the passes and recipes, or show one's page and options."""
    import fuseline  # noqa: F401  registers the passes of this package

    output = Output(json)
    if name in recipes():
        recipe = recipes()[name]
        output.line(f"{recipe.name}: {recipe.summary}\n\n  {recipe.pipeline}")
        if any(step.is_trained for step in Pipeline(recipe.name).passes):
            following(output, f'qat = fuseline.prepare_qat(model, "{recipe.name}", example)', "in Python: docs/qat.md")
        else:
            following(output, f"fuseline run demo:smollm2 -p {recipe.name}")
        output.write({"recipe": dataclasses.asdict(recipe)})
        return
    if name is not None:
        page = describe(registry.find(name))
        show_page(page, output)
        output.write(page)
        return
    pages = [describe(kind) for kind in registry.available().values()]
    rows = [[p["name"], p["tier"], p["level"], p["summary"]] for p in pages]
    table(output, ["pass", "tier", "level", "what it does"], rows)
    output.line("")
    table(output, ["recipe", "what it is for"], [[r.name, r.summary] for r in recipes().values()])
    following(output, "fuseline passes NAME", "its page: before and after, options, source")
    output.write({"passes": pages, "recipes": [dataclasses.asdict(recipe) for recipe in recipes().values()]})


def describe(kind: type[framework.Pass]) -> dict[str, Any]:
    """A pass as data: name, tier, level, options with types and defaults, documentation."""
    hints, helps = typing.get_type_hints(kind), comments(kind)
    page = framework.document(kind)
    return {
        "name": kind.name,
        "tier": kind.tier.value,
        "level": kind.level.value,
        "summary": page.splitlines()[0].removesuffix(f": `{kind.name}`.").rstrip(".") if page else "",
        "options": [
            {
                "name": field.name,
                "type": type_name(hints[field.name]),
                "default": _plain(field.default),
                "help": field.metadata.get("help") or helps.get(field.name, ""),
            }
            for field in framework.options(kind)
        ],
        "page": page,
        "example": (example := kind.example or kind.name),
        "trials": [kind.trial] if kind.trial else trials(example),
    }


def trials(example: str) -> list[str]:
    """What to type to see a pipeline at work."""
    commands = [f'fuseline run demo:smollm2 -p "{example}"']
    return commands if Pipeline(example).needs_data else [*commands, f'fuseline diff demo:tiny-llama -p "{example}"']


def type_name(kind: Any) -> str:
    """How a value is written in a pipeline: `a|b|c` for an enumeration, else the type's name."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "|".join(str(member.value) for member in kind)
    members = typing.get_args(kind)
    if members and type(None) in members:
        return "|".join([*(type_name(m) for m in members if m is not type(None)), "none"])
    return getattr(kind, "__name__", str(kind))


def written(default: Any) -> str:
    """A default as it stands in pipeline text; a dash for nothing."""
    if isinstance(default, bool) or default is None:
        return str(default).lower()
    return "–" if default in ("", "()") else str(default)


def told(option: dict[str, Any]) -> tuple[str, str]:
    """An option's default and what it is, with the values that it may have where they are counted."""
    several = option["type"].removesuffix("|none") if option["default"] is None else option["type"]
    values = several.replace("|", ", ") if "|" in several else ""
    return written(option["default"]), ": ".join(filter(None, (option["help"], values)))


def show_page(page: dict[str, Any], output: Output) -> None:
    output.console.print(page["page"], soft_wrap=True)
    output.line(f"\ntier {page['tier']}, level {page['level']}")
    table(output, ["option", "default", "what it is"], [[o["name"], *told(o)] for o in page["options"]])
    following(output, page["trials"][0])


def _plain(value: Any) -> Any:
    if value is dataclasses.MISSING:
        return None
    if isinstance(value, enum.Enum):
        return value.value
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
