"""What no kernel of ours takes, op by op through PyTorch against Inductor, on whole models of realistic sizes.

    python benchmarks/leftovers.py                       on one GPU
    python benchmarks/leftovers.py --small --device cpu  tries it out, kernels in Triton's interpreter

Each model runs with `leftovers="eager"`, then with "auto" and an empty cache. Columns: the leftover regions and how
many are distinct, how many run through Inductor, microseconds of the model's forward as it is launched and as its CUDA
graph is replayed, seconds of the first call. `regions` in the file holds each distinct region's ops and its four times.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ.setdefault("FUSELINE_CACHE", tempfile.mkdtemp(prefix="fuseline-leftovers-"))

import torch
from harness import Run, arguments
from harness.timing import graph_replays, repeated, synchronize

import fuseline

COLUMNS = (
    "name", "regions", "distinct", "compiled", "eager_us", "auto_us", "eager_replayed_us", "auto_replayed_us",
    "eager_first_s", "auto_first_s",
)  # fmt: skip
Built = tuple[torch.nn.Module, dict[str, Any]]


def vision(kind: str, config: dict[str, Any], batch: int, size: int = 224) -> Callable[[bool], Built]:
    def build(small: bool) -> Built:
        import transformers

        model = getattr(transformers, f"{kind}ForImageClassification")(getattr(transformers, f"{kind}Config")(**config))
        side = 64 if small else size
        if small and kind == "ViT":
            side = size
        return model, {"pixel_values": torch.randn(1 if small else batch, 3, side, side)}

    return build


def decoder(kind: str, config: dict[str, Any], small_config: dict[str, Any], length: int, experts: str | None = None):
    def build(small: bool) -> Built:
        import transformers

        settings = getattr(transformers, f"{kind}Config")(**(config | (small_config if small else {})))
        if experts:
            settings._experts_implementation = experts
        model = transformers.AutoModelForCausalLM.from_config(settings)
        return model, {"input_ids": torch.randint(1, 90, (1, length)), "use_cache": False}

    return build


def speech(small: bool) -> Built:
    import transformers

    config = transformers.WhisperConfig(encoder_layers=2, decoder_layers=2)
    model = transformers.WhisperModel(config).encoder
    return model, {"input_features": torch.randn(1 if small else 4, config.num_mel_bins, 3000)}


MOE = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
    "vocab_size": 32000, "head_dim": 128,
}  # fmt: skip
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_experts": 8, "num_attention_heads": 4, "head_dim": 16,
         "num_key_value_heads": 2, "moe_intermediate_size": 32, "vocab_size": 100, "intermediate_size": 64}  # fmt: skip
DENSE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32000}  # fmt: skip
MODELS: dict[str, tuple[torch.dtype, Callable[[bool], Built]]] = {
    "resnet50 b8 bf16": (torch.bfloat16, vision("ResNet", {}, 8)),
    "moe batched_mm, 1 token": (torch.bfloat16, decoder("Qwen3Moe", MOE, SMALL, 1, "batched_mm")),
    "moe grouped_mm, 1 token": (torch.bfloat16, decoder("Qwen3Moe", MOE, SMALL, 1, "grouped_mm")),
    "vit-b/16 b8 bf16": (torch.bfloat16, vision("ViT", {"num_hidden_layers": 4}, 8)),
    "dense decoder, 1 token": (torch.bfloat16, decoder("Llama", DENSE, SMALL, 1)),
    "whisper encoder b4 bf16": (torch.bfloat16, speech),
    "resnet50 b32 fp16": (torch.float16, vision("ResNet", {}, 32)),
    "mobilenet v2 b32 fp16": (torch.float16, vision("MobileNetV2", {}, 32)),
    "convnext-t b8 bf16": (torch.bfloat16, vision("ConvNext", {}, 8)),
    "moe grouped_mm, 512 tokens": (torch.bfloat16, decoder("Qwen3Moe", MOE, SMALL, 512, "grouped_mm")),
}


@torch.no_grad()
def fill(row: dict[str, Any], run: Run, name: str) -> None:
    dtype, build = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build(run.options.small)
    model = model.eval().to(run.device, dtype)
    inputs = {k: _moved(v, run.device, dtype) for k, v in inputs.items()}
    reference = _tensor(model(**inputs))
    for choice in ("eager", "auto"):
        torch.compiler.reset()
        tried = "inductor" if choice == "auto" and run.device.type != "cuda" else choice
        fuseline.optimize(model, target="triton", cuda_graphs=False, dynamic=False, leftovers=tried)
        began = time.perf_counter()
        result = _tensor(model(**inputs))
        synchronize(run.device)
        row[f"{choice}_first_s"] = time.perf_counter() - began
        row[f"{choice}_error"] = ((result - reference).abs().max() / reference.abs().max()).item()
        compilations = fuseline.reports(model)
        repeats = 2 if run.options.small else 20
        timing = repeated(lambda: model(**inputs), repeats, run.device, warmup=3)
        row.update(timing.row(f"{choice}_us", 1e6))
        if run.device.type == "cuda":
            try:
                row.update(graph_replays(lambda _: model(**inputs), 2, run.device).row(f"{choice}_replayed_us", 1e6))
            except RuntimeError as error:
                row[f"{choice}_replayed"] = str(error).splitlines()[0]
                synchronize(run.device)
    found = [x for c in compilations for x in c.leftovers.values()]
    row["regions"], row["refusals"] = len(found), compilations[-1].refusals
    counts = Counter(x.identity for x in found)
    row["distinct"] = len(counts)
    row["compiled"] = sum(any(x.shared.choices.values()) for x in found)
    row["details"] = [
        {
            "count": counts[x.identity],
            "ops": dict(Counter(str(n.target) for n in x.region.graph.nodes if n.op.startswith("call"))),
            "chosen": any(x.shared.choices.values()),
            **next((t.microseconds() for t in x.shared.times.values()), {}),
        }
        for x in {x.identity: x for x in found}.values()
    ]


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def _tensor(output: Any) -> torch.Tensor:
    return (output.logits if "logits" in output else output.last_hidden_state).float()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try it out")
    run = Run("leftovers", parser.parse_args(), floors=False)
    run.check(list(MODELS))
    for name in MODELS:
        run.measure(name, lambda row, name=name: fill(row, run, name))
    run.table(COLUMNS, "leftovers")
    for row in run.rows:
        for region in row.get("details", ()):
            run.console.print(row["name"], region, highlight=False)


if __name__ == "__main__":
    main()
