"""What the pass framework costs while nobody looks: actions without an observer, and the checks after each pass.

    python benchmarks/debugger_cost.py --json results.json

The graph is a Llama of 37 layers, about 2,400 nodes. `actions`: the same pipeline with its actions and with each
rewrite's action bypassed, in turn, medians of pairs of runs. `checks`: the structural hash, the graph's lint and the
quick verifier on that graph, in milliseconds. Only ratios of the first carry over to another machine.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from harness import Run, arguments

import fuseline
from fuseline import Pipeline, Program
from fuseline.compiler import rewriter
from fuseline.compiler.structure import structural_hash
from fuseline.compiler.verifier import verify

LAYERS = 37
PIPELINE = "raise,fuse"
ROWS = ("actions", "checks")
COLUMNS = ("name", "nodes", "rewrites", "with_ms", "bypassed_ms", "share", "hash_ms", "lint_ms", "verify_ms")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of runs")
    return parser.parse_args(words)


def program(layers: int) -> Program:
    """A narrow Llama of many layers, captured with its length symbolic."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    shapes = {"input_ids": {1: torch.export.Dim.AUTO}, "use_cache": None}
    return fuseline.capture(model, (torch.arange(16)[None],), {"use_cache": False}, dynamic=shapes)


class _NoAction:
    """Stands for an action that nobody opened: anything can be set on it, nothing is kept."""

    __slots__ = ()

    def __init__(self, *_: Any) -> None: ...

    def __setattr__(self, name: str, value: Any) -> None: ...


@contextlib.contextmanager
def bypassed() -> Iterator[None]:
    """Rewrites without actions: none is made, and no observer is asked or told."""
    kept = rewriter.Action, rewriter.Rewriter._allowed
    rewriter.Action = _NoAction  # type: ignore[assignment, misc]
    rewriter.Rewriter._allowed = lambda self, action: True  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        rewriter.Action, rewriter.Rewriter._allowed = kept  # type: ignore[misc, method-assign]


def milliseconds(function: Any) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1e3


def measure_actions(row: dict[str, Any], graph: Program, pairs: int) -> None:
    """Pairs of runs, the order turned each time; the share is the median of the pairs' differences."""
    run = lambda: Pipeline(PIPELINE).run(graph, verification="off")
    _, report = run()
    times: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(pairs):
        for without in (False, True) if pair % 2 else (True, False):
            with bypassed() if without else contextlib.nullcontext():
                times[without].append(milliseconds(run))
    differences = [(a - b) / b for a, b in zip(times[False], times[True], strict=True)]
    row |= {
        "nodes": len(graph),
        "rewrites": report.rewrites,
        "with_ms": statistics.median(times[False]),
        "bypassed_ms": statistics.median(times[True]),
        "share": statistics.median(differences),
        "quartiles": statistics.quantiles(differences, n=4),
        "action_us": action_microseconds(graph),
    }


def action_microseconds(graph: Program) -> float:
    """Opening one action with nobody watching, by itself: what the difference of two long runs is too noisy for."""
    made = rewriter.Rewriter(graph, "none")
    node = graph.graph.output_node()

    def many() -> None:
        for _ in range(10_000):
            action = rewriter.Action(1, "none", "none", made._site(node), (node,), node, many)
            made._allowed(action)
            action.created, action.replaced = [], {}
            for _observer in made.observers:
                pass

    return min(milliseconds(many) for _ in range(5)) * 1e3 / 10_000


def measure_checks(row: dict[str, Any], graph: Program, pairs: int) -> None:
    checks = {
        "hash_ms": lambda: structural_hash(graph),
        "lint_ms": lambda: graph.graph.lint(),
        "verify_ms": lambda: verify(graph, "quick"),
    }
    row["nodes"] = len(graph)
    for name, check in checks.items():
        check()
        row[name] = statistics.median(milliseconds(check) for _ in range(pairs))


def main() -> None:
    options = parse()
    run, graph = Run("debugger-cost", options, floors=False), program(options.layers)
    run.check(ROWS)
    run.measure("actions", lambda row: measure_actions(row, graph, options.pairs))
    run.measure("checks", lambda row: measure_checks(row, graph, options.pairs))
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
