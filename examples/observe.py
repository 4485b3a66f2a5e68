"""Watch a pipeline at work: the error after each pass, the rules that fired, and each stage as a file that runs.

    python examples/observe.py [DIRECTORY]

Every debugging feature is an observer of the same rewrites; your own is a class with the methods it needs.
"""

from __future__ import annotations

import sys
import tempfile

import torch

import fuseline
from fuseline.compiler.action import Action, Observer
from fuseline.compiler.observe import Dump, Numerics, Statistics, Timing
from fuseline.models import load


class Journal(Observer):
    """Each rewrite's number, rule and site. The numbers are the same at every run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def rewritten(self, action: Action, program: fuseline.Program) -> None:
        self.lines.append(str(action))


def main() -> None:
    directory = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="fuseline-stages-")
    loaded = load("demo:tiny-decoder")
    ids = torch.arange(32).unsqueeze(0)
    program = fuseline.capture(loaded.model, (ids,))

    journal, statistics, timing = Journal(), Statistics(), Timing()
    observers = [Numerics(), Dump(directory), statistics, timing, journal]
    _, report = fuseline.Pipeline("raise,quantize{weights=int8},fuse").run(program, observers)

    print(f"captured   rounding noise {report.captured_error:.1e}")
    for record in report.passes:
        print(f"{record.name:9}  error {record.error:.1e}, {timing.ms[record.name]:.0f} ms, {record.matched} rewrites")
    print(f"rules      {dict(statistics.rules)}")
    print(f"first      {journal.lines[0]}")
    print(f"next: {sys.executable} {directory}/002_quantize.py")


if __name__ == "__main__":
    main()
