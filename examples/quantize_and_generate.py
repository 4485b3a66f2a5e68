"""Quantize a language model and let it continue a text, original and quantized.

    python examples/quantize_and_generate.py                              a random model of two layers, in seconds
    python examples/quantize_and_generate.py --model demo:smollm2         SmolLM2-135M, its real weights

The bytes shown are those that a graph reads. Without a GPU quantized weights are expanded once: the results are those
of the codes, the speed is that of the original model, whose own weights stay in memory as well.
"""

from __future__ import annotations

import argparse

import torch

import fuseline
from fuseline.models import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:tiny-llama", help="a model of `fuseline run` that can generate()")
    parser.add_argument("--pipeline", default="raise,quantize{weights=int8},fuse")
    parser.add_argument("--prompt", default="A compiler is a program that")
    parser.add_argument("--tokens", type=int, default=8)
    given = parser.parse_args()

    loaded = load(given.model)
    ids = torch.tensor([loaded.encode(given.prompt)])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": given.tokens, "do_sample": False}
    original = loaded.model.generate(ids, **settings)

    # In place: `generate()` calls the model itself. `torch.compile(model).generate` would reach no backend.
    fuseline.optimize(loaded.model, given.pipeline)
    quantized = loaded.model.generate(ids, **settings)

    for title, tokens in (("original ", original), ("quantized", quantized)):
        print(f"{title}  {loaded.decode(tokens[0].tolist())!r}")
    for number, compilation in enumerate(fuseline.reports(loaded.model)):
        before, after = compilation.captured.weight_bytes(), compilation.program.weight_bytes()
        rewritten = ", ".join(f"{p.name} {p.matched}" for p in compilation.report.passes)
        print(f"graph {number}    {rewritten}; weights {before / 1e6:.1f} → {after / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
