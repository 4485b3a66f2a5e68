"""What leaving input channels out costs on held-out text, at one budget of bytes for the whole model, by each method.

    python benchmarks/sparsity.py --device cpu --json benchmarks/results/DATE-cpu-sparsity.json
    python benchmarks/sparsity.py --sparsity 50 --methods "teal uniform" "searched"

Sparsity is the percentage of the products' bytes that is not read: kept columns and low-rank factors together are the
budget, at their true shapes, the head left out. Methods: `searched` (evolution over shares and splits; the branch where
it pays), `searched channels` (the same without branches), `sensitivity` (the same in closed form), `uniform` (R-Sparse
with a split of 0.95 and the weights' singular vectors everywhere), `teal uniform`, `teal greedy`, `gate only` (CATS).

`kl` is KL(dense ‖ sparse) in nats a position, with all positions sparse; `kl_last_tenth` and `ppl_last_tenth` are with
the protocol of R-Sparse's released code, in which only the last tenth of the positions is sparse (over all positions,
as published). Thresholds, sensitivities and the search use the calibration half of `pydoc_data.topics`, figures the
other.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from harness import Run, arguments
from harness.held_out import HeldOut
from sparsities.cats import GateOnly, fraction

import fuseline
from fuseline.compiler.framework import Study
from fuseline.models import metrics, text
from fuseline.passes.sparsity import RSparse
from fuseline.passes.sparsity.budgets import Budgets
from fuseline.passes.sparsity.decide import Decision, plans
from fuseline.passes.sparsity.factors import Factors
from fuseline.passes.sparsity.options import LowRankUse, Score
from fuseline.passes.sparsity.trial import Masked
from fuseline.runtime.tensor_store import TensorStore

COLUMNS = ("name", "kl", "perplexity", "top1", "kl_last_tenth", "ppl_last_tenth", "branches", "seconds")
METHODS: dict[str, dict[str, Any]] = {
    "teal uniform": {"budgets": Budgets.UNIFORM, "split": "1"},
    "teal greedy": {"budgets": Budgets.GREEDY, "split": "1"},
    "uniform": {
        "budgets": Budgets.UNIFORM, "split": "0.95", "low_rank": LowRankUse.ON, "factors": Factors.WEIGHTS
    },
    "gate only": {},
    "sensitivity": {"budgets": Budgets.SENSITIVITY},
    "searched channels": {"low_rank": LowRankUse.OFF},
    "searched": {},
}  # fmt: skip


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[25, 40, 50, 60, 70], help="percent not read")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--score", default="abs", choices=[score.value for score in Score])
    parser.add_argument("--calibration", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--windows", type=int, default=8, help="windows of held-out text")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--trials", type=int, default=64, help="candidates of a search")
    parser.add_argument("--calls", type=int, default=4, help="calibration windows that a candidate is run on")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


class Benchmark(HeldOut):
    """One model in float32, its activations on the calibration text, and the dense logits of the held-out text."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options)
        windows = self.cut(text.calibration_text(), options.calibration)
        calls = [{"input_ids": ids.to(self.device), "use_cache": False} for ids in windows]
        with torch.no_grad():
            captured = fuseline.capture(self.loaded.model, (), calls[0])
            self.program, _ = fuseline.Pipeline("raise").run(captured)
        module = captured.to_module()
        self.data = [module.arguments(**call) for call in calls]
        self.flat = {id(ids): module.arguments(input_ids=ids, use_cache=False) for ids in self.held_out}
        self.score, self.decisions = Score(options.score), dict[Factors, Decision]()
        self.dense = {id(ids): self.logits(Masked(self.program))(ids) for ids in self.held_out}
        self.sizes: dict[Any, torch.Tensor] = {}

    def logits(self, trial: Masked) -> metrics.Logits:
        @torch.no_grad()
        def call(ids: torch.Tensor) -> torch.Tensor:
            return trial(self.flat[id(ids)])[0]

        return call

    def compared(self, trial: Masked) -> metrics.Metrics:
        return metrics.compare(lambda ids: self.dense[id(ids)], self.logits(trial), self.held_out)

    def decision(self, step: RSparse) -> Decision:
        if step.factors not in self.decisions:
            self.decisions[step.factors] = Decision(step, Study(self.program, self.data, results=TensorStore()))
        decision = self.decisions[step.factors]
        decision.step = step
        return decision

    def fill(self, row: dict[str, Any], method: str, budget: float) -> None:
        started = time.perf_counter()
        row |= {"method": method, "budget": budget}
        if method == "gate only":
            make = self.gate_only(budget)
        else:
            settings = {"score": self.score, "trials": self.options.trials, "calls": self.options.calls}
            step = replace(RSparse(budget=budget, seed=self.options.seed, **settings), **METHODS[method])
            decision = self.decision(step)
            choices, record = decision.choose()
            masks = decision.masks(choices)
            make = lambda dense: Masked(self.program, masks, dense)
            found = plans(decision, choices, record)
            row |= {"pass": str(step), **found.pop("").structure}
            row["groups"] = {
                site: {k: v for k, v in one.structure.items() if k not in ("leader", "probe")}
                for site, one in found.items()
                if one.structure.get("leader") == site
            }
            row["branches"] = sum(choice.rank > 0 for choice in choices.values())
        row["seconds"] = time.perf_counter() - started
        result = self.compared(make(0.0))
        row |= {"dense_perplexity": result.perplexity_before, "perplexity": result.perplexity_after}
        row |= {"kl": result.kl, "top1": result.top1}
        result = self.compared(make(0.9))
        row |= {"kl_last_tenth": result.kl, "ppl_last_tenth": result.perplexity_after}

    def gate_only(self, budget: float) -> Any:
        """CATS at this budget; its fraction counts all products but the head."""
        groups = self.decision(RSparse(score=self.score)).groups
        total = sum(group.bytes for group in groups)
        gated = sum(g.bytes // len(g.sites) for g in groups if g.kind.startswith(("gate", "down")))
        share = fraction(budget, total, gated)
        if not self.sizes:
            self.sizes = GateOnly(self.program).observe(self.data)
        thresholds = {node: float(s[min(int((1 - share) * len(s)), len(s) - 1)]) for node, s in self.sizes.items()}
        return lambda dense: GateOnly(self.program, thresholds, dense)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    run, benchmark = Run("sparsity", options, floors=False), Benchmark(options)
    rows = {f"{s:g}% {method}": (method, 1 - s / 100) for s in options.sparsity for method in options.methods}
    run.check(tuple(rows))
    for name, (method, budget) in rows.items():
        run.measure(name, lambda row, method=method, budget=budget: benchmark.fill(row, method, budget))
    order = [*METHODS]
    run.rows.sort(key=lambda row: (float(row["name"].split("%")[0]), order.index(row["name"].split("% ")[1])))
    run.save()
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
