"""Experts merged, pruned and rounded: what the methods of `merge-experts` and `quantize` cost small mixtures.

    python benchmarks/moe_methods.py --device cuda --json benchmarks/results/DATE-GPU-moe-methods.json
    python benchmarks/moe_methods.py --device cpu --quick

Byte-level decoders with 16 experts of which 2 are chosen, and 64 of which 8 are, are trained on the standard library's
sources, one a seed, and then compressed, all calibrated on the same windows of the training text. `loss` is the
held-out cross-entropy in nats a byte, a mean over seeds, `spread` its range; `cost` is the loss less that of the model
as it was, of the same seeds; `bytes` is what experts take of their bfloat16 bytes, codes' scales and factors included.

The table ends with what it is to show: puzzle at 50% costs at most half of what average and hc cost there; milo at 3
bits at most half of what hqq costs. Codes in groups of 32 are there to be compared at milo's bytes.
"""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch
from harness import Run, arguments, release, replace_defaults
from training import Corpus, held_out
from training.loop import loss_of

import fuseline
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.progress import steps
from fuseline.models.mixture import TinyMixture

COLUMNS = ("name", "bytes", "loss", "spread", "cost", "losses", "row_seconds")
MODELS = {"16 top-2": (16, 2, 4), "64 top-8": (64, 8, 1)}
"""Experts, how many are chosen, and their width as a multiple of the smallest."""

MERGES = {
    "puzzle": "method=puzzle",
    "puzzle, magnitude": "method=puzzle,saliency=magnitude",
    "puzzle, searched": "method=puzzle,pairs=searched",
    "average": "method=average",
    "hc": "method=hc",
    "hc, sliced": "method=hc,router=slice",
    "reap": "method=reap",
    "partial-preservation": "method=partial-preservation",
}
MILO = "merge-experts{{method=milo,weights=int{bits}:g64,rank={rank},ranks={ranks},rounds={rounds}}}"
ROUNDED = "quantize{{weights=int{bits}{group},only=*.experts,method={method}}}"


def rows(rank: int, rounds: int) -> dict[str, str]:
    """Name → what follows `raise`."""
    found = {"as it was": ""}
    for percent in (25, 50):
        found |= {f"{name} {percent}%": f"merge-experts{{{o},ratio={percent / 100}}}" for name, o in MERGES.items()}
    for bits in (8, 4, 3, 2):
        group = "" if bits == 8 else ":g64"
        found[f"rtn int{bits}"] = ROUNDED.format(bits=bits, group=group, method="rtn")
        if bits < 8:
            found[f"hqq int{bits}"] = ROUNDED.format(bits=bits, group=group, method="hqq")
    for method in ("rtn", "hqq"):  # about as many bytes as milo has with its factors
        found[f"{method} int3:g32"] = ROUNDED.format(bits=3, group=":g32", method=method)
    for bits in (4, 3, 2):
        found[f"milo int{bits}"] = MILO.format(bits=bits, rank=rank, ranks="uniform", rounds=rounds)
    for ranks in ("kurtosis", "frequency"):
        found[f"milo int3, {ranks}"] = MILO.format(bits=3, rank=rank, ranks=ranks, rounds=rounds)
    for name in ("reap", "partial-preservation"):
        found[f"{name} 50%, hqq int4"] = f"{found[f'{name} 50%']},{found['hqq int4']}"
    return found


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--inner", type=int, default=128, help="an expert's width, where 64 are there")
    parser.add_argument("--length", type=int, default=256, help="bytes a window")
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--bytes", type=int, default=16_000_000, help="of text, held out or not")
    parser.add_argument("--windows", type=int, default=256, help="held-out windows")
    parser.add_argument("--calibration", type=int, default=8, help="batches of the training text to calibrate on")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--rank", type=int, default=8, help="of milo, on average")
    parser.add_argument("--rounds", type=int, default=5, help="of milo")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--quick", action="store_true", help="models and steps that a CPU does in minutes")
    options = parser.parse_args(words)
    if options.quick:
        small = {"hidden": 64, "layers": 2, "heads": 4, "inner": 64, "length": 64, "batch": 16, "bytes": 1_000_000}
        small |= {"windows": 64, "steps": 300, "rate": 3e-3, "rank": 4, "rounds": 3, "calibration": 4}
        replace_defaults(parser, options, small)
    return options


class Benchmark:
    """The text, and one trained model for each kind and seed."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        torch.set_float32_matmul_precision("high")
        self.corpus = Corpus(options.bytes, self.device)
        self.windows = list(self.corpus.windows(options.windows, options.batch, options.length))
        batches = self.corpus.batches(options.calibration, options.batch, options.length, seed=10**6)
        self.calibration = [batch[:, :-1] for batch in batches]
        self.models = {(kind, s): self.trained(kind, s) for kind in options.models for s in range(options.seeds)}
        self.before: dict[str, list[float]] = {}

    def trained(self, kind: str, seed: int) -> TinyMixture:
        """A model in the dtype that it is measured in: bfloat16 on a GPU."""
        o, (experts, chosen, width) = self.options, MODELS[kind]
        torch.manual_seed(seed)
        model = TinyMixture(256, o.hidden, o.layers, o.heads, o.heads // 2, experts, chosen, o.inner * width)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "experts" not in name:
                torch.nn.init.normal_(parameter, std=o.hidden**-0.5)
        model = model.to(self.device).train()
        on_gpu = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(model.parameters(), o.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, o.rate, total_steps=o.steps, pct_start=0.05)
        batches = self.corpus.batches(o.steps, o.batch, o.length, seed)
        for batch in steps(batches, f"training {kind}, seed {seed}", total=o.steps):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
                loss = loss_of(model, batch) + o.balance * model.balance()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return model.eval().to(torch.bfloat16 if on_gpu else torch.float32).requires_grad_(False)

    def fill(self, row: dict[str, Any], kind: str, passes: str) -> None:
        """A row for one method on one kind of model; of all seeds."""
        found = [self.one(self.models[kind, seed], passes) for seed in range(self.options.seeds)]
        losses = [loss for loss, _ in found]
        if not passes:
            self.before[kind] = losses
        mean = lambda values: sum(values) / len(values)
        row |= {"passes": passes, "loss": mean(losses), "losses": losses, "bytes": mean([part for _, part in found])}
        row["spread"] = max(losses) - min(losses)
        if kind in self.before:
            row["costs"] = [loss - before for loss, before in zip(losses, self.before[kind], strict=True)]
            row["cost"] = mean(row["costs"])

    @torch.no_grad()
    def one(self, model: TinyMixture, passes: str) -> tuple[float, float]:
        """The held-out loss, and what experts take of their bfloat16 bytes."""
        pipeline = Pipeline(f"raise,{passes}" if passes else "raise")
        plan = fuseline.analyze(model, pipeline, self.calibration) if pipeline.needs_data else None
        ids = self.calibration[0]
        dynamic = {"ids": {0: torch.export.Dim.AUTO}}
        program, _ = pipeline.run(fuseline.capture(model, (ids,), dynamic=dynamic), plan=plan)
        experts = [n for n in program.weights() if any(".experts." in p for p in n.meta["weight"].parameters())]
        size = sum(n.meta["val"].nbytes for n in experts if "router" not in str(n.meta["weight"].parameters()))
        whole = sum(2 * layer.experts.gate_up.numel() + 2 * layer.experts.down.numel() for layer in model.layers)
        loss = held_out(program.to_module(), self.windows)[0]
        release(self.device)
        return loss, size / whole


def verdicts(run: Run) -> list[str]:
    """What the table is to show, with its numbers."""
    cost = {row["name"]: row["cost"] for row in run.rows if "cost" in row}
    lines = []
    for kind in run.options.models:
        of = lambda name, kind=kind: cost.get(f"{kind}: {name}")
        for ours, theirs in (("puzzle 50%", "average 50%"), ("puzzle 50%", "hc 50%"), ("milo int3", "hqq int3")):
            if of(ours) is not None and of(theirs) is not None:
                ratio = of(ours) / of(theirs) if of(theirs) else float("nan")
                lines.append(f"{kind}: {ours} costs {ratio:.2f} of {theirs} ({of(ours):.4f}, {of(theirs):.4f})")
    return lines


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    run = Run("moe-methods", options, floors=False)
    methods = rows(options.rank, options.rounds)
    names = {f"{kind}: {name}": (kind, passes) for kind in options.models for name, passes in methods.items()}
    run.check(tuple(names))
    benchmark = Benchmark(options)
    run.record["corpus"] = {
        "training": len(benchmark.corpus.training),
        "held_out": len(benchmark.corpus.held_out),
        "python": platform.python_version(),
        "parameters": {kind: sum(p.numel() for p in benchmark.models[kind, 0].parameters()) for kind in options.models},
    }
    for row in run.rows:  # --resume
        if row["name"].endswith(": as it was") and "losses" in row:
            benchmark.before[row["name"].partition(":")[0]] = row["losses"]
    for name, (kind, passes) in names.items():
        run.measure(name, lambda row, kind=kind, passes=passes: benchmark.fill(row, kind, passes))
    run.table(COLUMNS)
    run.record["verdicts"] = verdicts(run)
    for line in run.record["verdicts"]:
        run.console.print(line)


if __name__ == "__main__":
    main()
