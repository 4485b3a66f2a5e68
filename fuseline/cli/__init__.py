"""The command line: one small file a verb. Exit codes: 0, 2 for the user's mistakes, 1 for everything else."""

from __future__ import annotations

import sys
import traceback
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from fuseline.cli.analyze import analyze
from fuseline.cli.bisect import bisect
from fuseline.cli.cache import cache
from fuseline.cli.command import split_command
from fuseline.cli.compare import compare
from fuseline.cli.completion import completion
from fuseline.cli.diff import diff
from fuseline.cli.doctor import doctor
from fuseline.cli.examine import examine
from fuseline.cli.experts import experts
from fuseline.cli.export import export
from fuseline.cli.kernels import kernels
from fuseline.cli.memory import memory
from fuseline.cli.opt import opt
from fuseline.cli.passes import passes
from fuseline.cli.plan import plan
from fuseline.cli.reduce import reduce
from fuseline.cli.replay import replay
from fuseline.cli.repro import repro
from fuseline.cli.reproducers import reproducers
from fuseline.cli.run import run
from fuseline.cli.sparsity import sparsity
from fuseline.cli.view import view
from fuseline.cli.why import why
from fuseline.compiler.errors import FuselineError

HELP = "A graph compiler for PyTorch models. VERB -h: options; --debug: tracebacks."
VERBS = (
    run, passes, examine, analyze, sparsity, experts, plan, memory, opt, export, kernels, cache, compare, why, bisect,
    reduce, repro, diff, view, replay, doctor, completion,
)  # fmt: skip


class Verbs(TyperGroup):
    """Its help lists the verbs alone, so that it fits a screen: its one option is the one that was just typed."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)


app = typer.Typer(
    cls=Verbs,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 80, "help_option_names": ["-h", "--help"]},
)
for verb in VERBS:
    app.command()(verb)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits; `arguments` default to those of the process."""
    arguments, command = split_command(list(sys.argv[1:] if arguments is None else arguments))
    debug = "--debug" in arguments
    # A bare --verify means the quick checks; the parser knows only options that always take a value.
    arguments = ["--verify=quick" if a == "--verify" else a for a in arguments if a != "--debug"]
    try:
        with reproducers(arguments):
            app(arguments, obj={"command": command})
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        ours = find_ours(error)
        if ours is not None:
            _fail(str(ours), ours.exit_code, debug)
        notes = [f"  {line}" for line in getattr(error, "__notes__", ())]
        remedy = "  try: the same command with --debug, which shows where"
        message = "\n".join([f"{type(error).__name__}: {error}", *notes, remedy])
        _fail(message, 1, debug)


def find_ours(error: BaseException | None) -> FuselineError | None:
    """The error of Fuseline in a chain of causes: what a backend raises, Dynamo wraps."""
    while error is not None and not isinstance(error, FuselineError):
        error = error.__cause__ or getattr(error, "inner_exception", None)
    return error


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
