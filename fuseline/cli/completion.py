"""`fuseline completion SHELL`: the script that lets a shell complete verbs and options."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.completion import completion_init, get_completion_script

from fuseline.cli import options
from fuseline.cli.output import Output
from fuseline.compiler.errors import UserError, nearest

SHELLS = {
    "bash": "source <(fuseline completion bash)    # in ~/.bashrc",
    "zsh": "source <(fuseline completion zsh)    # in ~/.zshrc, after compinit",
    "fish": "fuseline completion fish > ~/.config/fish/completions/fuseline.fish",
}

completion_init()  # so that the program answers the script's questions


def completion(
    shell: Annotated[str | None, typer.Argument(metavar="[SHELL]", help="bash, zsh or fish; else yours.")] = None,
    json: options.Json = None,
) -> None:
    """Print the script that completes verbs and options in a shell."""
    name = shell or Path(os.environ.get("SHELL", "bash")).name
    if name not in SHELLS:
        raise UserError(f"no completion for the shell '{name}'{nearest(name, SHELLS)}")
    script = get_completion_script(prog_name="fuseline", complete_var="_FUSELINE_COMPLETE", shell=name)
    if json != "-":
        print(script)
    print(f"next: {SHELLS[name]}", file=sys.stderr)
    Output(json).write({"shell": name, "script": script, "install": SHELLS[name]})
