"""Activation sparsity: thresholds and a budget by site, from data; in decoding, weights that are not read.

python examples/rsparse.py                                   a random model of two layers, in seconds
python examples/rsparse.py --model demo:smollm2 --budget 0.5 SmolLM2-135M, its real weights
"""

from __future__ import annotations

import argparse

import torch

import fuseline
from fuseline.models import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:tiny-llama", help="a model of `fuseline run`")
    parser.add_argument("--budget", type=float, default=0.5, help="the share of the products' bytes that is read")
    given = parser.parse_args()

    loaded = load(given.model)
    torch.manual_seed(0)
    vocabulary = loaded.model.config.vocab_size
    batches = [{"input_ids": torch.randint(0, vocabulary, (2, 32)), "use_cache": False} for _ in range(4)]
    pipeline = f"raise,rsparse{{budget={given.budget},budgets=sensitivity,prefill=sparse}}"
    with torch.no_grad():
        expected = loaded.model(**batches[0]).logits
        plan = fuseline.analyze(loaded.model, pipeline, batches)
        sparse = fuseline.optimize(loaded.model, pipeline, plan=plan)
        gap = ((sparse(**batches[0]).logits - expected).abs().max() / expected.abs().max()).item()
    report = fuseline.reports(sparse)[0].report["rsparse"]
    print(f"rsparse: {report.matched} products read {given.budget:.0%} of their bytes; the logits are off by {gap:.1e}")
    for site in list(plan.sites)[:4]:
        print(f"  {site}")


if __name__ == "__main__":
    main()
