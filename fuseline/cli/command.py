"""The command behind `--`: `fuseline bisect -- python train.py` runs it, and no option of it is ours."""

from __future__ import annotations

import typer

from fuseline.compiler.errors import UserError


def split_command(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, for the parser, and the command that stands behind it."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def command_of(context: typer.Context) -> list[str]:
    """The command that the user wrote behind `--`; empty without one."""
    return list((context.find_root().obj or {}).get("command", ()))


def graph_or_command(graph: str | None, command: list[str], verb: str) -> None:
    """Holds a verb to one of its two forms.

    Raises:
        UserError: both, or neither, were given.
    """
    if (graph is None) == (not command):
        problem = "a GRAPH and a command were both given" if command else "there is neither a GRAPH nor a command"
        raise UserError(
            problem, remedy=f'fuseline {verb} -- python script.py    or: fuseline {verb} GRAPH -p "…" --check any'
        )
