"""Formats chosen by site under a budget of bytes, `bits=auto`, beside one format for all at the same bytes.

    python benchmarks/budgets.py --device cpu --json benchmarks/results/DATE-cpu-budgets.json

For each uniform scheme, `auto` has the bytes that the uniform weights take, scales and zero points included. Figures
are on held-out text in float32: the ratio of perplexities, the mean KL to the original in nats, and what the choice was
`expected` to cost (the sum of the sites' measured sensitivities, in nats).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from compared.ours import Ours
from compared.score import Judge
from compared.settings import Setting
from harness import Run, arguments, release

from fuseline.models import text
from fuseline.models.spec import load

COLUMNS = ("name", "bits", "uniform", "auto", "kl_uniform", "kl_auto", "expected", "seconds", "chosen")
SCHEMES = ("int8", "int6:g64", "int5:g64", "int4:g64", "int3:g64", "int4:g64 method=gptq", "int3:g64 method=gptq")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.set_defaults(budget=3600)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, default=1024, help="held-out tokens")
    parser.add_argument("--calibration", type=int, default=2048, help="tokens to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--batch", type=int, default=2, help="windows a call")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), help='uniform ones: "int4:g64 method=gptq"')
    return parser.parse_args(words)


class Benchmark:
    """One model and its text."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        loaded = load(options.model)
        model = loaded.model.eval().to(self.device)

        def cut(source: str, tokens: int) -> list[torch.Tensor]:
            windows = text.windows(source, loaded.encode, options.length, tokens // options.length)
            whole = len(windows) // options.batch * options.batch  # all calls have one shape
            return list(torch.cat(windows[:whole]).to(self.device).split(options.batch))

        held_out = cut(text.evaluation_text(), options.tokens)
        self.judge = Judge(lambda ids: model(input_ids=ids, use_cache=False).logits, held_out)
        self.ours = Ours(model, cut(text.calibration_text(), options.calibration))

    def fill(self, row: dict[str, Any], scheme: str) -> None:
        weights, _, method = scheme.partition(" ")
        options = ",".join(filter(None, (f"weights={weights}", method)))
        score, facts, _ = self.ours.measure(Setting(scheme, "uniform", f"quantize{{{options}}}"), self.judge)
        row |= {"bits": facts["bits"], "uniform": score.over(self.judge.loss), "kl_uniform": score.kl}
        pipeline = f"quantize{{{options},bits=auto:{facts['bits']:.4f}bits}}"
        row["pipeline"] = pipeline
        score, facts, plan = self.ours.measure(Setting(scheme, "auto", pipeline), self.judge)
        assert plan is not None
        sites = [one.structure for one in plan.of("quantize").values()]
        counts: dict[str, int] = {}
        for one in sites:
            name = one["scheme"].partition(":")[0]
            counts[name] = counts.get(name, 0) + 1
        row |= {
            "auto": score.over(self.judge.loss),
            "kl_auto": score.kl,
            "bits_auto": facts["bits"],
            "expected": sum(one["cost"] for one in sites),
            "seconds": facts["seconds"],
            "chosen": ", ".join(f"{counts[name]} {name}" for name in sorted(counts, reverse=True)),
        }
        release(self.device)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    run, benchmark = Run("budgets", options, floors=False), Benchmark(options)
    run.check(options.schemes)
    for scheme in options.schemes:
        run.measure(scheme, lambda row, scheme=scheme: benchmark.fill(row, scheme))
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
