"""Round-to-nearest weight quantization against torchao, on the same model, text and script.

    pip install --no-deps torchao
    python benchmarks/quantization.py --device cpu --json benchmarks/results/DATE-quantization.json

Each row is one scheme: perplexity of the original, ours through `fuseline.optimize`, torchao's through `quantize_`, and
the bytes of the quantized linears as a share of bf16. The head stays as it is on both sides.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from harness import Run, arguments

import fuseline
from fuseline.models import metrics, text
from fuseline.models.spec import load

COLUMNS = ("name", "perplexity", "to_original", "perplexity_torchao", "to_torchao", "kl", "kl_torchao", "bytes_to_bf16")
SCHEMES = ("int8", "int8:asym", "int4:g64:asym", "int4:g64:sym", "int4:g32:sym", "int4:g192:asym")


def torchao_quantized(model: torch.nn.Module, scheme: str) -> torch.nn.Module:
    """torchao's round-to-nearest at the same bits, group and symmetry, head left alone."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    bits, *parts = scheme.split(":")
    group = next((int(p[1:]) for p in parts if p[0] == "g"), None)
    symmetric = "sym" in parts or (bits == "int8" and "asym" not in parts)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, bits),
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
    )
    head = model.get_output_embeddings()
    quantize_(model, config, filter_fn=lambda m, _: isinstance(m, torch.nn.Linear) and m is not head)
    return model


def linear_bytes(compilation: Any) -> tuple[int, int]:
    """Bytes of the quantized weights, and of the same weights in bf16."""
    quantized = parameters = 0
    for node in compilation.program.weights():
        expression = node.meta["weight"]
        if type(expression).__name__ == "Param":
            continue
        value = node.meta["val"]
        quantized += value.numel() * value.element_size()
        if type(expression).__name__ == "Pack":
            parameters += compilation.program.sources[expression.parameters()[0]].tensor.numel()
    return quantized, 2 * parameters


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--scheme", action="append")
    return parser.parse_args(words)


class Benchmark:
    """One model and its text, in float32."""

    def __init__(self, options: argparse.Namespace):
        loaded = load(options.model)
        self.device = torch.device(options.device)
        self.original = loaded.model.eval().to(self.device)
        self.texts = text.windows(text.evaluation_text(), loaded.encode, options.length, options.windows)

    def compared(self, model: torch.nn.Module) -> metrics.Metrics:
        """Beside the original."""
        return metrics.compare(self.logits(self.original), self.logits(model), self.texts)

    def logits(self, model: torch.nn.Module) -> metrics.Logits:
        @torch.no_grad()
        def call(ids: torch.Tensor) -> torch.Tensor:
            return model(ids.to(self.device), use_cache=False).logits.cpu()

        return call

    def fill(self, row: dict[str, Any], scheme: str) -> None:
        row["scheme"] = scheme
        ours = fuseline.optimize(copy.deepcopy(self.original), f"quantize{{weights={scheme}}}")
        mine = self.compared(ours)
        quantized, wide = linear_bytes(fuseline.reports(ours)[0])
        row |= {
            "perplexity_original": mine.perplexity_before,
            "perplexity": mine.perplexity_after,
            "to_original": mine.perplexity_after / mine.perplexity_before,
            "kl": mine.kl,
            "top1": mine.top1,
            "bytes_to_bf16": quantized / wide,
        }
        peer = self.compared(torchao_quantized(copy.deepcopy(self.original), scheme))
        row |= {
            "perplexity_torchao": peer.perplexity_after,
            "to_torchao": mine.perplexity_after / peer.perplexity_after,
            "kl_torchao": peer.kl,
        }


def main() -> None:
    options = parse()
    run, benchmark = Run("quantization", options, floors=False), Benchmark(options)
    schemes = options.scheme or SCHEMES
    run.check(schemes)
    for scheme in schemes:
        run.measure(scheme, lambda row, scheme=scheme: benchmark.fill(row, scheme))
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
