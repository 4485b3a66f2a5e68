"""A run: rows measured one after another, a failing one kept with its reason, the file written after each.

What a row could measure before it failed stays in it. `--resume` keeps the finished rows of the file and measures the
others: those that failed, were cut off, or came after the budget was spent; rows that `--only` leaves out stay as they
are. A CUDA error that leaves the device unusable is the row's reason too; the script then starts anew with `--resume`,
which leaves that row as it is.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .environment import circumstances, short_name, shown
from .rates import device_rates

RESULTS = Path(__file__).resolve().parent.parent / "results"
UNFINISHED = "cut off while it was measured"
Row = dict[str, Any]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to measure (default: all)")
    parser.add_argument(
        "--json", type=Path, help="results file (default on a GPU: benchmarks/results/DATE-GPU-NAME.json)"
    )
    parser.add_argument("--resume", action="store_true", help="keep the finished rows of the results file")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no row is begun (default: 540)")
    return parser


def replace_defaults(parser: argparse.ArgumentParser, options: argparse.Namespace, values: dict[str, Any]) -> None:
    """Sets options to other values where they have their defaults."""
    for name, value in values.items():
        if getattr(options, name) == parser.get_default(name):
            setattr(options, name, value)


class Run:
    """One benchmark's rows and their file.

    Args:
        name: of the results file, DATE-GPU-NAME.json; without a GPU one is written only where `--json` names it.
        options: the parsed `arguments`; all of them are recorded.
        floors: whether to measure the device's rates first.
    """

    def __init__(self, name: str, options: argparse.Namespace, floors: bool = True):
        self.started = time.monotonic()
        self.options, self.device = options, torch.device(options.device)
        self.console = Console(width=None if sys.stdout.isatty() else 160)
        facts = circumstances(self.device)
        self.path: Path | None = options.json
        if self.path is None and self.device.type == "cuda":
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            self.path = RESULTS / f"{today}-{short_name(facts['gpu'])}-{name}.json"
        chosen = {key: shown(str(value)) if isinstance(value, Path) else value for key, value in vars(options).items()}
        self.record: dict[str, Any] = {"environment": facts, "options": chosen, "rows": []}
        if options.resume and self.path is not None and self.path.exists():
            self.rows.extend(kept(json.loads(self.path.read_text(encoding="utf-8")), facts, self.wanted))
        self.rates = device_rates(self.device) if floors else {}
        self.record["rates"] = self.rates
        if self.rates:
            bandwidth, flops = self.rates["bandwidth"] / 1e12, self.rates["matmul_flop_s"] / 1e12
            name = facts["gpu"] if self.device.type == "cuda" else "cpu"
            self.console.print(f"{name}: {bandwidth:.3g} TB/s, {flops:.4g} TFLOP/s", highlight=False)

    @property
    def rows(self) -> list[Row]:
        return self.record["rows"]

    def check(self, names: Collection[str]) -> None:
        """Whether every name of `--only` is one of the rows."""
        unknown = [name for name in self.options.only or () if name not in names]
        if unknown:
            raise SystemExit(f"error: no row {', '.join(unknown)}; there are {', '.join(names)}")

    def seconds_left(self) -> float:
        return self.options.budget - (time.monotonic() - self.started)

    def wanted(self, name: str) -> bool:
        return not self.options.only or name in self.options.only

    def measure(self, name: str, fill: Callable[[Row], None]) -> Row | None:
        """One row: `fill` writes its figures into it as it goes. None where the row is not wanted or there already."""
        if not self.wanted(name) or any(row["name"] == name for row in self.rows):
            return None
        row: Row = {"name": name}
        self.rows.append(row)
        if self.seconds_left() <= 0:
            row["skipped"] = f"the budget of {self.options.budget:g} s was spent"
            self.save()
            return row
        row["failed"] = UNFINISHED
        self.save()
        began = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            fill(row)
            del row["failed"]
        except Exception as error:  # a candidate that fails is a finding, and the other rows are kept
            row["failed"] = reason(error)
            row["trace"] = trace(error)
            if not self.alive():
                row["lost"] = True
        row["row_seconds"] = time.monotonic() - began
        if self.device.type == "cuda" and "lost" not in row:
            row["peak_memory"] = torch.cuda.max_memory_allocated(self.device)
        self.save()
        self.say(row)
        if "lost" in row:
            self.start_anew()
        release(self.device)
        return row

    def say(self, row: Row) -> None:
        outcome = f"[red]failed[/]: {escape(row['failed'])}" if "failed" in row else f"{row['row_seconds']:.1f} s"
        self.console.print(f"{escape(row['name'])}: {outcome}", highlight=False)

    def save(self) -> None:
        if self.path is not None:
            write(self.path, self.record)

    def table(self, columns: Sequence[str], title: str = "") -> None:
        """Prints those figures of the rows that were asked for, numbers to four digits, and where the file is.

        A column that no row has is left out.
        """
        rows = [row for row in self.rows if self.wanted(row["name"])]
        columns = [column for column in columns if any(column in row for row in rows)]
        table = Table(title=title or None, box=None, pad_edge=False, header_style="bold", title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column == "name" else "right", overflow="fold")
        for row in rows:
            if "failed" not in row and "skipped" not in row:
                table.add_row(*(escape(show(row.get(column))) for column in columns))
        self.console.print(table)
        for row in rows:
            for key in ("failed", "skipped"):
                if key in row:
                    self.console.print(f"{escape(row['name'])}: {key}: {escape(row[key])}", highlight=False)
        if self.path is not None:
            self.console.print(f"written: {self.path}", highlight=False, soft_wrap=True)

    def alive(self) -> bool:
        """Whether the device still works, after an error that may have ended its context."""
        if self.device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self.device)
            return bool(torch.ones(1, device=self.device).item())
        except RuntimeError as error:
            return isinstance(error, torch.OutOfMemoryError)

    def start_anew(self) -> None:
        """The same command in a fresh process image, with the rows so far."""
        self.console.print("the device was lost to that row: starting anew for the others")
        sys.stdout.flush()
        words = [word for word in sys.orig_argv[1:] if word != "--resume"]
        words += [] if self.options.json is not None else ["--json", str(self.path)]
        words += ["--budget", f"{max(self.seconds_left(), 1):.0f}", "--resume"]
        os.execv(sys.executable, [sys.executable, *words])


def write(path: Path, record: dict[str, Any]) -> None:
    """The whole record, under a name of its own first, so that a run that is cut leaves a sound file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)


def kept(record: dict[str, Any], facts: dict[str, Any], wanted: Callable[[str], bool]) -> list[Row]:
    """The rows of an earlier run that are not to be measured again, if that ran on the same device and versions.

    Each says at which commit it was measured.
    """
    for fact in ("gpu", "torch", "triton"):
        then, now = record["environment"].get(fact), facts.get(fact)
        if then != now:
            raise SystemExit(f"error: --resume: the file's rows were measured with {fact} {then}, and this is {now}")
    again = lambda row: "lost" not in row and {"failed", "skipped"} & set(row) and wanted(row["name"])
    rows = [row for row in record["rows"] if not again(row)]
    return [{"commit": record["environment"].get("commit"), **row} for row in rows]


def reason(error: BaseException) -> str:
    """An exception in one line; of one that Dynamo wrapped, what was wrapped."""
    error = getattr(error, "inner_exception", None) or error
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def trace(error: BaseException) -> list[str]:
    """Where it was raised, innermost last, without the machine's folders."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}" for frame in frames]


def release(device: torch.device) -> None:
    """What a row's model and compilations held, before the next one."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def show(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
