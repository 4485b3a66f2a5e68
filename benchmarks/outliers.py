"""What planted outliers cost a quantized model, and how much of that `rotate` recovers.

    python benchmarks/outliers.py --device cpu --json benchmarks/results/DATE-cpu-outliers.json

Each row is one scheme. Outlier channels are planted so that the function of the model stays the same
(`benchmarks/planting`), and the same text is predicted four times: with and without them, with and without `rotate`
before `quantize`. Log-perplexities, in nats:

    cost       quantized planted − quantized
    left       rotated, quantized planted − quantized
    recovered  1 − left / cost: what of the cost is gone, with the model without outliers and rotation as the reference
    to_rotated 1 − (rotated, quantized planted − rotated, quantized) / cost: the same against a rotated reference

The row `planting` has the largest error of the logits in float64 and how heavy the tails became.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from harness import Run, arguments, release
from planting import Spread, plant, reflect

import fuseline
from fuseline.compiler.precision import error, floats, run_promoted
from fuseline.models import metrics, text
from fuseline.models.spec import load

COLUMNS = ("name", "outliers", "original", "quantized", "rotated", "planted", "planted_rotated", "cost",
           "recovered", "to_rotated")  # fmt: skip
INT8 = "weights=int8,activations=int8:token"
KV4 = "keys=int4:asym,values=int4:asym"


@dataclass(frozen=True)
class Case:
    """quantize, rotate: the passes' options; pairs: what is planted, see `planting.plant`; none: the stream."""

    quantize: str
    rotate: str
    pairs: tuple[tuple[str, float], ...] = ()


CASES = {
    "W8A8": Case(INT8, "r1,r2,r4", (("inner", 64), ("values", 16), ("norms", 64))),
    "W4A8": Case("weights=int4,activations=int8:token", "r2,r4", (("inner", 1 / 16), ("values", 1 / 8))),
    "W4A4KV4": Case(
        f"weights=int4,activations=int4:token:asym,{KV4}",
        "r1,r2,r3,r4",
        (("inner", 16), ("inner", 1 / 16), ("values", 4), ("keys", 4), ("norms", 16)),
    ),
    "W4A8 inner": Case("weights=int4:g64,activations=int8:token", "r4", (("inner", 128),)),
    "W8A8 inner": Case(INT8, "r4", (("inner", 256),)),
    "KV4 values": Case(KV4, "r2", (("values", 32),)),
    "KV4 keys": Case(KV4, "r3", (("keys", 32),)),
    "W8A8 norms": Case(INT8, "r1", (("norms", 64),)),
    "W8A8 stream": Case(INT8, "r1,untie"),
    "A4 stream": Case("activations=int4:token:asym", "r1,untie"),
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo:smollm2", help="a Llama")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--channels", type=int, default=2, help="planted a layer and kind; of heads, one each")
    parser.add_argument("--seed", type=int, default=0, help="which channels")
    return parser.parse_args(words)


class Benchmark:
    """One model and its text, in float32."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        loaded = load(options.model)
        self.original = loaded.model.eval().to(options.device)
        texts = text.windows(text.evaluation_text(), loaded.encode, options.length, options.windows)
        self.texts = [ids.to(options.device) for ids in texts]

    def planted(self, case: Case, model: Any) -> Any:
        """A copy of the model with the case's outliers."""
        changed = copy.deepcopy(model)
        if not case.pairs:
            reflect(changed, self.direction(model))
        else:
            plant(changed, case.pairs, self.options.channels, self.options.seed)
        return changed

    def reference(self, case: Case, model: Any) -> Any:
        """What the case's outliers are planted into: the model; for the stream, a copy whose norms have no scales."""
        if case.pairs:
            return model
        folded = copy.deepcopy(model)
        reflect(folded, None)
        return folded

    @torch.no_grad()
    def direction(self, model: Any) -> torch.Tensor:
        """The direction that holds most of what the norms of the model are given: the first right singular vector."""
        seen: list[torch.Tensor] = []
        norms = [layer.input_layernorm for layer in model.model.layers[1:]]
        hooks = [n.register_forward_hook(lambda m, x, y: seen.append(y[0, 1:].double())) for n in norms]
        model(self.texts[0][:, :128], use_cache=False)
        for hook in hooks:
            hook.remove()
        rows = torch.cat(seen)
        return torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]

    @torch.no_grad()
    def log_perplexity(self, model: Any) -> float:
        return metrics.log_perplexity(lambda ids: model(ids, use_cache=False).logits, self.texts)

    def quantized(self, model: Any, case: Case, rotated: bool) -> float:
        rotate = f"rotate{{{case.rotate}}}," if rotated else ""
        pipeline = f"raise,{rotate}quantize{{{case.quantize}}}"
        found = self.log_perplexity(fuseline.optimize(copy.deepcopy(model), pipeline))
        release(torch.device(self.options.device))
        return found

    def fill(self, row: dict[str, Any], case: Case) -> None:
        planted = ", ".join(f"{kind} {factor:g}" for kind, factor in case.pairs)
        row |= {"outliers": planted or "stream", "quantize": case.quantize, "rotate": case.rotate}
        reference = self.reference(case, self.original)
        changed = self.planted(case, reference)
        row["original"] = self.log_perplexity(reference)
        row["planted_original"] = self.log_perplexity(changed)
        for name, model, rotated in (
            ("quantized", reference, False),
            ("planted", changed, False),
            ("planted_rotated", changed, True),
            ("rotated", reference, True),
        ):
            row[name] = self.quantized(model, case, rotated)
        row |= recovered(row)

    def check(self, row: dict[str, Any]) -> None:
        """The error of the logits in float64 on a short text, and the tails of what is quantized."""
        ids, original = self.texts[0][:, :32], copy.deepcopy(self.original).double()
        row["errors"], row["tails"] = {}, {}
        for name, case in CASES.items():
            before = self.reference(case, original)
            after = self.planted(case, before)
            tails = []
            for model in (before, after):
                with Spread(model) as spread, torch.no_grad():
                    model(ids, use_cache=False)
                tails.append(spread.summary())
            row["tails"][name] = {kind: {"before": tails[0][kind], "after": tails[1][kind]} for kind in tails[0]}
            row["errors"][name] = difference(before, after, ids)
        row["error"] = max(row["errors"].values())


def difference(before: Any, after: Any, ids: torch.Tensor) -> float:
    """The error of `after`'s logits in float64, also where the models' code casts to float32. Both are converted."""
    programs = [fuseline.capture(model.double(), (ids,), {"use_cache": False}) for model in (before, after)]
    with torch.no_grad():
        results = [floats(run_promoted(program, program.examples)) for program in programs]
    return max(error(a, b) for b, a in zip(*results, strict=True))


def recovered(row: dict[str, Any]) -> dict[str, float]:
    """cost, left, recovered and to_rotated of the four log-perplexities."""
    cost = row["planted"] - row["quantized"]
    left = row["planted_rotated"] - row["quantized"]
    beyond = row["planted_rotated"] - row["rotated"]
    share = lambda x: 1 - x / cost if cost else math.nan
    return {"cost": cost, "left": left, "recovered": share(left), "to_rotated": share(beyond)}


def main() -> None:
    options = parse()
    run, benchmark = Run("outliers", options, floors=False), Benchmark(options)
    run.check(("planting", *CASES))
    run.measure("planting", benchmark.check)
    for name, case in CASES.items():
        run.measure(name, lambda row, case=case: benchmark.fill(row, case))
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
