"""Round-to-nearest weight quantization against torchao, on the same model, text and script.

    pip install --no-deps torchao
    python benchmarks/quantization.py --model demo:smollm2 --json benchmarks/results/DATE-quantization.json

Each row is one scheme: perplexity of the original, ours through `fuseline.optimize`, torchao's through `quantize_`, and
the bytes of the quantized linears as a share of bf16. The head stays as it is on both sides.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from pathlib import Path
from typing import Any

import torch

import fuseline
from fuseline.models import metrics, text
from fuseline.models.spec import load

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--scheme", action="append")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loaded = load(options.model)
    original = loaded.model.eval()
    texts = text.windows(text.evaluation_text(), loaded.encode, options.length, options.windows)

    def logits(model: torch.nn.Module) -> metrics.Logits:
        @torch.no_grad()
        def call(ids: torch.Tensor) -> torch.Tensor:
            return model(ids, use_cache=False).logits

        return call

    rows = []
    for scheme in options.scheme or SCHEMES:
        torch.compiler.reset()
        ours = fuseline.optimize(copy.deepcopy(original), f"quantize{{weights={scheme}}}")
        mine = metrics.compare(logits(original), logits(ours), texts)
        quantized, wide = linear_bytes(fuseline.reports(ours)[0])
        peer = metrics.compare(logits(original), logits(torchao_quantized(copy.deepcopy(original), scheme)), texts)
        rows.append(
            {
                "scheme": scheme,
                "perplexity_original": mine.perplexity_before,
                "perplexity": mine.perplexity_after,
                "perplexity_torchao": peer.perplexity_after,
                "to_original": mine.perplexity_after / mine.perplexity_before,
                "to_torchao": mine.perplexity_after / peer.perplexity_after,
                "kl": mine.kl,
                "kl_torchao": peer.kl,
                "top1": mine.top1,
                "bytes_to_bf16": quantized / wide,
            }
        )
        row = rows[-1]
        print(
            f"{scheme:16} perplexity {row['perplexity']:8.3f} = {row['to_original']:.4f}x of the original, "
            f"{row['to_torchao']:.4f}x of torchao's   bytes {row['bytes_to_bf16']:.4f}x of bf16",
            flush=True,
        )
    if options.json:
        import torchao

        versions = {"python": platform.python_version(), "torch": torch.__version__, "torchao": torchao.__version__}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"versions": versions, "command": vars(options) | {"json": str(options.json)}, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
