"""Record: what a pipeline did, as one JSON file: every stage's nodes, every rewrite, times, refusals, errors, memory.

`fuseline view` draws it. The file is written again after each pass, so a run that fails leaves what it got to.

    format, version    "fuseline-record", 1
    nodes[]            each distinct state of a node (`node_data`); a node that changes has several, with one id
    stages[]           name, title, file (the dumped stage), nodes (positions in `nodes`, in graph order), memory
    passes[]           the pass's report; refusals[] (site, reason, node: the id of what stood there before the pass)
    actions[]          number, pass (position in `passes`), rule, location (file:line), site, root, match, removed (of
                       the match), created, replaced (pairs of ids), ms, skipped
    failure            null, or the pass that raised, its error as text, and how many rewrites it had made
    ended, stopped     whether the pipeline came to its end; the error that it was stopped by, where that is known
    kernels            null, or what lowering made of the last stage: `add_kernels`
    excerpts, stacks   lines of code by file:line; stacks of frames by number
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..action import Action, Observer
from ..compat import size_hint, symbolic_expression
from ..errors import UserError
from ..framework import Pass
from ..liveness import liveness, tensors
from ..program import Program
from ..report import PassReport, Report
from ..sites import sites
from .node_data import Numbers, Sources, node_data

if TYPE_CHECKING:
    from ..pipeline import Pipeline

FILE, FORMAT, VERSION = "record.json", "fuseline-record", 1


class Record(Observer):
    """Writes `record.json` into `directory`, or keeps it as `data` alone when that is None.

    Put it behind observers that answer `allows` slowly (an interactive one), since it times each rewrite from there.
    """

    def __init__(self, directory: str | Path | None = None):
        self.directory = Path(directory) if directory is not None else None
        self.data: dict[str, Any] = {}

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None:
        self._number, self._sources = Numbers(), Sources()
        self._states: dict[int, tuple[dict[str, Any], int]] = {}
        self._reports: list[tuple[PassReport, list[dict[str, Any]]]] = []
        self._locations: dict[str | None, str | None] = {}
        self._sites: dict[str, int] = {}
        self._opened: tuple[int, float] = (0, 0.0)
        self.data = {
            "format": FORMAT,
            "version": VERSION,
            "pipeline": str(pipeline),
            "torch": torch.__version__,
            "symbols": _symbols(program),
            "captured_error": None,
            "nodes": [],
            "stages": [],
            "passes": [],
            "actions": [],
            "failure": None,
            "ended": False,
            "kernels": None,
        }
        self._stage("captured", "as captured", program)
        self._write()

    def pass_starts(self, step: Pass, program: Program) -> None:
        self._program = program
        self._tell_passes()  # the pass before has been verified since it ended
        self._sites = {site: self._number(node) for node, site in sites(program.graph).items()}

    def allows(self, action: Action) -> bool:
        self._close_skipped()
        self.data["actions"].append(self._describe(action))
        for node in action.removed:  # one that this very pass has made is in no stage, and is recorded here
            if self._number(node) not in self._states:
                self._state(node_data(self._program, node, self._number, self._sources))
        self._opened = action.number, time.perf_counter()
        return True

    def rewritten(self, action: Action, program: Program) -> None:
        _, started = self._opened
        data = self.data["actions"][-1]
        data["ms"] = (time.perf_counter() - started) * 1e3
        data["removed"] = [self._number(node) for node in action.removed if node._erased]
        data["created"] = [self._number(node) for node in action.created]
        data["replaced"] = [[self._number(old), self._number(new)] for old, new in action.replaced.items()]
        self._opened = 0, 0.0

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        self._close_skipped()
        refusals = [
            {"site": site, "reason": reason, "node": self._sites.get(site)} for site, reason in report.refused.items()
        ]
        self._reports.append((report, refusals))
        self._stage(step.name, f"after {step}", program)
        self._write()

    def pipeline_ends(self, program: Program, report: Report) -> None:
        self.data["captured_error"] = report.captured_error
        self.data["ended"] = True
        self._write()
        self._number, self._states = Numbers(), {}  # keeps no graph alive
        del self._program

    def failed(self, step: Pass, program: Program, error: BaseException) -> None:
        self._close_skipped()
        done = [a for a in self.data["actions"] if a["pass"] == len(self._reports) and not a["skipped"]]
        self.data["failure"] = {
            "pass": step.name,
            "text": str(step),
            "error": f"{type(error).__name__}: {error}",
            "rewrites": len(done),
        }
        self._stage(step.name, f"where {step} failed, after {len(done)} rewrites", program)
        self._write()

    def _stage(self, name: str, title: str, program: Program) -> None:
        nodes = [self._state(node_data(program, node, self._number, self._sources)) for node in program.graph.nodes]
        stage = {"name": name, "title": title, "file": f"{len(self.data['stages']):03d}_{name}.py", "nodes": nodes}
        self.data["stages"].append({**stage, "memory": _memory(program)})

    def _state(self, data: dict[str, Any]) -> int:
        """The position of a node's state in `nodes`: the last one, where nothing has changed since."""
        known = self._states.get(data["id"])
        if known is None or known[0] != data:
            self._states[data["id"]] = known = (data, len(self.data["nodes"]))
            self.data["nodes"].append(data)
        return known[1]

    def _describe(self, action: Action) -> dict[str, Any]:
        where = action.location
        if where not in self._locations:
            self._locations[where] = self._sources.rule(where)
        number: Any = self._number
        return {
            "number": action.number,
            "pass": len(self._reports),
            "rule": action.rule,
            "location": self._locations[where],
            "site": action.site,
            "root": number(action.root),
            "match": [number(node) for node in action.removed],
            "removed": [],
            "created": [],
            "replaced": [],
            "ms": None,
            "skipped": False,
        }

    def _close_skipped(self) -> None:
        """The rewrite that was asked for last and never came was skipped by an observer after this one."""
        if self._opened[0]:
            self.data["actions"][-1]["skipped"] = True
            self._opened = 0, 0.0

    def _tell_passes(self) -> None:
        self.data["passes"] = [{**asdict(report), "refusals": refusals} for report, refusals in self._reports]
        for entry in self.data["passes"]:
            del entry["refused"]

    def _write(self) -> None:
        self._tell_passes()
        self.data["excerpts"], self.data["stacks"] = self._sources.excerpts, self._sources.stacks
        if self.directory is not None:
            write_record(self.directory, self.data)


def read_record(directory: str | Path) -> dict[str, Any]:
    """The record that a run left in a directory.

    Raises:
        UserError: there is none, it is damaged, or it was written by a version of another format.
    """
    path = Path(directory) / FILE
    remedy = f"fuseline run MODEL -p PIPELINE --dump {directory}"
    if not path.is_file():
        raise UserError(f"{directory} holds no {FILE}", ["it is written where the stages of a run are"], remedy)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}", remedy=remedy) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path} is not a record of a run", remedy=remedy)
    if data.get("version") != VERSION:
        raise UserError(f"{path} has version {data.get('version')}, and this Fuseline reads {VERSION}", remedy=remedy)
    return data


def write_record(directory: str | Path, data: Mapping[str, Any]) -> Path:
    """Writes a record, whole or not at all; returns its path."""
    path = Path(directory) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    write = functools.partial(json.dumps, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        text = write(data)
    except ValueError:  # an error that is infinite or NaN
        text = write(finite(data))
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def add_kernels(data: dict[str, Any], kernels: list[dict[str, Any]], eager: list[dict[str, str]]) -> None:
    """Adds what lowering made of the last stage.

    Args:
        kernels: name, ops, lines, made_by, regions (their names in the graph), source and whatever else is known.
        eager: region, reason: the regions that run through PyTorch.
    """
    data["kernels"] = {"kernels": kernels, "eager": eager}


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _symbols(program: Program) -> dict[str, int]:
    """The symbolic sizes of the inputs and the numbers that stand for them."""
    found: dict[str, int] = {}
    values = [n.meta.get("val") for n in program.placeholders]
    for size in [s for t in tensors(values) for s in t.shape] + values:
        if isinstance(size, torch.SymInt) and getattr(symbolic_expression(size), "is_symbol", False):
            found[str(symbolic_expression(size))] = size_hint(size)
    return found


def _memory(program: Program) -> dict[str, Any] | None:
    """Bytes alive while each node runs; None for a graph that is too broken to tell."""
    try:
        found = liveness(program)
    except Exception:  # the graph of a pass that failed half-way; the stage is shown without its memory
        return None
    return {"live": list(found.live), "weights": found.weights, "inputs": found.inputs, "peak": found.peak}
