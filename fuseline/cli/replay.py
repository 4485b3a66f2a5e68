"""`fuseline replay`: what codegen emits, recorded on one commit and compared on another."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.output import Output
from fuseline.cli.render import following, table
from fuseline.compiler.errors import UserError
from fuseline.compiler.progress import bar, step
from fuseline.replay.against import checkout, commit_of, here, record_in_process
from fuseline.replay.compare import ERROR, INDEX, KERNEL, MANIFEST, Change, Difference, Recording, compare, read
from fuseline.replay.corpus import Case, corpus

SHOWN = 12  # changes
LINES = 40  # of one change


def replay(
    directory: Annotated[str | None, typer.Argument(metavar="DIR", help="A recording, to compare or to write.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Write DIR: what codegen emits here and now.")] = False,
    against: Annotated[str | None, typer.Option(metavar="REV", help="Compare with this commit; needs no DIR.")] = None,
    name: Annotated[str | None, typer.Option("--corpus", metavar="C", help="tiny, families or a TOML file.")] = None,
    json: options.Json = None,
) -> None:
    """Show what a change does to the emitted kernels.

    Example: fuseline replay --against main    exits 0 where nothing differs
    """
    if (directory is None) == (against is None) or (record and against is not None):
        raise UserError(
            "replay takes DIR, or --against REV",
            remedy="fuseline replay --against main; or fuseline replay DIR --record, and fuseline replay DIR later",
        )
    if directory is not None and not record and name is not None:
        raise UserError("DIR knows its corpus", remedy="leave out --corpus, or record another DIR")
    output = Output(json)
    if directory is not None and record:
        output.write(_record(Path(directory), corpus(name or "tiny"), output))
        return
    with tempfile.TemporaryDirectory(prefix="fuseline-replay-") as temporary, contextlib.ExitStack() as stack:
        if against is not None:
            commit, cases = commit_of(against), corpus(name or "tiny")
            before = _emit(stack.enter_context(checkout(against)), cases, Path(temporary, "before"), against)
            title = f"{against} ({commit[:12]})"
        else:
            before = read(Path(str(directory)))
            cases, title = before.cases, str(directory)
        after = _emit(here(), cases, Path(temporary, "after"), "here")
    difference = compare(before, after)
    _show(difference, before, title, output)
    output.write({"before": title, "different": bool(difference), **difference.to_json()})
    if difference:
        raise typer.Exit(1)


def _emit(root: Path, cases: list[Case], folder: Path, title: str) -> Recording:
    with bar(f"emitting, {title}", len(cases)) as progress:
        record_in_process(root, cases, folder, lambda case: step(progress))
    return read(folder)


def _record(folder: Path, cases: list[Case], output: Output) -> dict[str, Any]:
    """Writes a recording in one step, in the place of an older one if there is one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) and not (folder / INDEX).is_file()):
        raise UserError(f"{folder} is there and no recording: nothing was written", remedy="another DIR")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        recording = _emit(here(), cases, new, "here")
        shutil.rmtree(folder, ignore_errors=True)
        new.replace(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    kernels = {case: sum(file.startswith("kernels/") for file in files) for case, files in recording.files.items()}
    failed = {case: files["error.txt"].strip() for case, files in recording.files.items() if "error.txt" in files}
    output.line(f"recorded {sum(kernels.values())} kernels of {len(cases)} cases in {folder}")
    for reason, count in Counter(failed.values()).most_common():
        output.line(f"  nothing emitted for {count}: {reason}")
    following(output, f"fuseline replay {folder}", "after a change: what it does to them")
    return {"path": str(folder), "kernels": kernels, "failed": failed}


def _show(difference: Difference, before: Recording, title: str, output: Output) -> None:
    """A row a case that differs, then each change once."""
    total = sum(len(k.same) for k in difference.cases.values())
    if not difference:
        output.line(f"no difference from {title}: {total} kernels of {len(difference.cases)} cases")
        return
    names = {case.folder: str(case) for case in before.cases}
    rows, equal = [], 0
    for case, k in difference.cases.items():
        counts = [len(k.same), len(k.changed), len(k.added), len(k.removed), len(k.renamed)]
        if not any(counts[1:]) and not any(case in change.cases for change in difference.changes):
            equal += 1
            continue
        rows.append([*map(str, counts), names[case]])
    table(output, ["same", "changed", "added", "removed", "renamed", "case"], rows)
    if equal:
        output.line(f"and {equal} cases without a difference")
    for what, cases in (("only here", difference.added), ("no longer", difference.removed)):
        for case in cases:
            output.line(f"{what}: {names.get(case, case)}")
    for what in ("added", "removed"):
        found = Counter(name for k in difference.cases.values() for name in getattr(k, what))
        if found:
            output.line(f"{what}: {_some(list(found))}")
    renamed = dict.fromkeys(f"{a} → {b}" for k in difference.cases.values() for a, b in k.renamed.items())
    if renamed:
        output.line(f"renamed: {_some(list(renamed))}")
    manifests = [change for change in difference.changes if change.kind == MANIFEST]
    others = [change for change in difference.changes if change.kind != MANIFEST]
    shown = [*others[:SHOWN], *manifests[: max(1, SHOWN - len(others))]]
    for change in shown:
        _show_change(change, output)
    if len(difference.changes) > len(shown):
        output.line(f"\n… and {len(difference.changes) - len(shown)} more changes (--json FILE has them all)")
    following(output, "fuseline replay … --json FILE", "every change with every place")


def _show_change(change: Change, output: Output) -> None:
    """A hunk, and where it was made."""
    places = list(dict.fromkeys(file for _, file in change.places))
    what = {KERNEL: "kernels", ERROR: "errors"}.get(change.kind, change.places[0][1])
    count = f"{len(change.places)} {what}" if change.kind in (KERNEL, ERROR) else f"{what}, {len(change.places)} times"
    if len(change.places) == 1:
        count = f"kernel {places[0]}" if change.kind == KERNEL else places[0]
    also = f": {_some(places)}" if change.kind == KERNEL and len(change.places) > 1 else ""
    output.line(f"\nin {count} of {len(change.cases)} case{'s' * (len(change.cases) > 1)}{also}")
    for line in change.lines[:LINES]:
        style = {"-": "red", "+": "green"}.get(line[0])
        output.console.print(f"  {line}", style=style, soft_wrap=True)
    if len(change.lines) > LINES:
        output.line(f"  … {len(change.lines) - LINES} more lines")


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
