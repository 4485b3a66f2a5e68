"""`decode.py --all`: every point of the decode step that docs/benchmarks.md shows, each in a process of its own.

    python benchmarks/decode.py --all --list                       the points, what each shows, its estimated seconds
    python benchmarks/decode.py --all                              as many as fit in the budget, the most telling first
    python benchmarks/decode.py --all --resume                     what is missing, in the newest files of this device
    python benchmarks/decode.py --all --only 8b-1k --peers all     one point, with the peers that compile long
    python benchmarks/decode.py --all --only 8b-b16 --layers 8     shortened: 4 and 8 layers, the rest extrapolated
    python benchmarks/decode.py --all --device cpu                 what a CPU can: SmolLM2 through Inductor
    python benchmarks/decode.py --all --device cpu --model-shape tiny --target eager     tries every point out

A point that fails, runs out of memory or takes the device with it loses its own rows alone; a point that runs past the
budget is stopped, and keeps the rows that it has. The results are DATE-GPU-decode-points.json (steps), -kernels.json
with its plot -kernels.svg (each kernel of the steps), -quality.json (SmolLM2) and -starts.json (compilation).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from harness.environment import circumstances, short_name
from harness.run import RESULTS, write
from rich.console import Console

from .points import COMPILE, FILES, PEERS, POINTS, Point, tried
from .roofline import drawn, kernel_rows

BENCHMARKS = Path(__file__).resolve().parent.parent
LAST = 5.0  # seconds that a point is given to end by itself


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "decode.py --all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", metavar="POINT", help="points to measure (default: all)")
    parser.add_argument(
        "--candidates", nargs="+", metavar="NAME", help="these in the place of the points' own and of the peers"
    )
    parser.add_argument("--peers", choices=PEERS, default="cheap", help="beside ours (default: cheap, reduce-overhead)")
    parser.add_argument("--layers", type=int, help="shorten the 8B and 1B models: measured with half as many, too")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all (default: 540)")
    parser.add_argument("--resume", action="store_true", help="keep the finished rows of the newest files")
    parser.add_argument("--results", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--model-shape", choices=["tiny"], help="tries the points out with a tiny model")
    parser.add_argument("--target", help="Fuseline's target (default: auto; inductor on a CPU)")
    parser.add_argument("--list", action="store_true", help="print the points and measure nothing")
    options = parser.parse_args(words)
    if options.layers is not None and options.layers < 2:
        parser.error("--layers needs 2 or more: half as many are measured, too")
    unknown = [name for name in options.only or () if name not in {point.name for point in POINTS}]
    if unknown:
        parser.error(f"no point {', '.join(unknown)}; there are {', '.join(point.name for point in POINTS)}")
    unknown = [name for name in options.candidates or () if name not in COMPILE]
    if unknown:
        parser.error(f"no candidate {', '.join(unknown)}; there are {', '.join(COMPILE)}")
    return options


def chosen(options: argparse.Namespace) -> list[Point]:
    """The points that the options ask for, as they are to be run."""
    points = [point for point in POINTS if not options.only or point.name in options.only]
    if options.layers is not None:
        points = [replace(p, layers=options.layers) if p.script != "decode_quality.py" else p for p in points]
    if options.candidates:
        points = [replace(p, ours=tuple(options.candidates), peers=False) for p in points]
    if options.model_shape:
        points = [tried(point) for point in points]
    device = torch.device(options.device).type
    return [point for point in points if device in point.devices]


@dataclass
class Sequence:
    """Runs the points one after another. outcomes: each point's name and what became of it."""

    options: argparse.Namespace
    facts: dict[str, Any]
    folder: Path
    console: Console
    began: float = field(default_factory=time.monotonic)
    outcomes: dict[str, str] = field(default_factory=dict)

    def left(self) -> float:
        return self.options.budget - (time.monotonic() - self.began)

    def path(self, kind: str) -> Path:
        """A results file of today; with `--resume` the newest of this device."""
        device = short_name(self.facts["gpu"])
        found = sorted(self.folder.glob(f"*-{device}-decode-{kind}.json")) if self.options.resume else []
        return found[-1] if found else self.folder / f"{self.facts['date']}-{device}-decode-{kind}.json"

    def missing(self, point: Point) -> list[str]:
        """The rows of a point that its file has not, or has not measured."""
        finished = {row["name"] for row in read(self.path(FILES[point.script]))["rows"] if done(row)}
        return [name for name in point.rows(self.options.peers) if name not in finished]

    def run(self, point: Point) -> None:
        """One point, unless it is measured already or would not end in time."""
        path, estimate = self.path(FILES[point.script]), point.estimate(self.options.peers)
        if not self.options.resume:
            forget(path, point.rows(self.options.peers))
        missing = self.missing(point)
        if not missing:
            self.outcomes[point.name] = "measured before"
            return
        estimate *= len(missing) / len(point.rows(self.options.peers))
        if self.left() < min(estimate, self.options.budget / 2):
            self.outcomes[point.name] = f"not begun: about {estimate:.0f} s, and {max(self.left(), 0):.0f} s are left"
            return
        self.console.rule(f"{point.name}: {point.says} (about {estimate:.0f} s of {self.left():.0f} s)")
        code = self.process(point, path)
        self.derive(point)
        missing = self.missing(point)
        said = {None: "stopped by the budget", 0: "done"}.get(code, f"ended with exit code {code}")
        self.outcomes[point.name] = f"{said}{f'; missing: {chr(59).join(missing)}' if missing else ''}"

    def process(self, point: Point, path: Path) -> int | None:
        """Runs a point's script in a process of its own: its exit code, None if the budget stopped it."""
        words = point.command(self.options.peers)
        words += ["--device", self.options.device, "--json", str(path), "--resume", "--budget", f"{self.left():.0f}"]
        target = self.options.target or ("inductor" if torch.device(self.options.device).type == "cpu" else None)
        words += ["--target", target] if target else []
        command = [sys.executable, str(BENCHMARKS / words[0]), *words[1:]]
        child = subprocess.Popen(command, start_new_session=True)  # with what it starts itself
        try:
            return child.wait(max(self.left(), LAST))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def derive(self, point: Point) -> None:
        """The table of kernels and its plot, from the rows of the steps."""
        record = read(self.path("points"))
        if point.script == "decode.py" and (rows := kernel_rows(record)):
            kernels = {**record, "rows": rows}
            written = self.path("kernels")
            write(written, kernels)
            written.with_suffix(".svg").write_text(drawn(kernels), encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def done(row: dict[str, Any]) -> bool:
    return not {"failed", "skipped"} & set(row)


def forget(path: Path, names: list[str]) -> None:
    """Takes rows out of a results file; the others stay."""
    record = read(path)
    rows = [row for row in record["rows"] if row["name"] not in names]
    if len(rows) != len(record["rows"]):
        write(path, {**record, "rows": rows})


def main(words: list[str]) -> int:
    options = parse(words)
    points, console = chosen(options), Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if options.list:
        for point in points:
            rows = len(point.rows(options.peers))
            console.print(f"{point.name:13} {point.estimate(options.peers):5.0f} s  {rows:2} rows  {point.says}")
        total = sum(point.estimate(options.peers) for point in points)
        console.print(f"about {total:.0f} s on one H200, --peers {options.peers}")
        return 0
    folder = options.results or (Path(tempfile.mkdtemp(prefix="fuseline-decode-")) if options.model_shape else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    sequence = Sequence(options, circumstances(torch.device(options.device)), folder.resolve(), console)
    for point in points:
        sequence.run(point)
    console.rule(f"{datetime.timedelta(seconds=round(time.monotonic() - sequence.began))} of {options.budget:g} s")
    for name, outcome in sequence.outcomes.items():
        console.print(f"{name:13} {outcome}", markup=False)
    console.print(f"results: {folder}", soft_wrap=True, markup=False)
    if any(sequence.missing(point) for point in points):
        console.print("the rest: the same command with --resume")
    return int(any("exit code" in outcome for outcome in sequence.outcomes.values()))
