"""LoRA on a rotated model and then W4A4, beside LoRA and then W4A4 (RoLoRA: Huang et al., 2024).

    pip install --no-deps peft
    python benchmarks/rolora.py --device cuda

Both train the same adapters on the same batches, from the same initial values: `lora` in eager, `rolora` on the model
optimized with `rotate`. Then the adapters are merged and the linears quantized, of `rolora` behind the same rotation.
Each row is a seed, of the adapters, the order of the text and the rotation; the row `untrained` has no adapters.
Log-perplexities of held-out text, in nats: `original` and `*_trained` as they are, the others quantized.

The adapters stay parameters of the model as it is: the pass rotates them at each call, and gradients pass through that.
Up to rounding, then, both are trained alike, and what is compared is what they are worth once quantized.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import torch
from harness import Run, arguments, release
from harness.held_out import HeldOut

import fuseline
from fuseline.compiler.errors import UserError
from fuseline.models import text

COLUMNS = ("name", "original", "lora_trained", "rolora_trained", "lora", "rolora", "gain", "loss_first", "loss_last")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo:smollm2", help="demo:NAME, hf:DIR or gguf:FILE, a Llama")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--windows", type=int, default=32, help="of held-out text")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; alpha is the same")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--quantize", default="weights=int4:sym:mse,activations=int4:token:asym")
    parser.add_argument("--rotate", default="r1,r4,kind=random-hadamard")
    return parser.parse_args(words)


class Benchmark(HeldOut):
    """One model and its text, in float32."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options)
        self.training = torch.cat(self.cut(text.calibration_text(), 1 << 20)).to(self.device)

    def batches(self, seed: int) -> Iterator[torch.Tensor]:
        """ids [batch, length], the whole text in a new order each time."""
        draw = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(len(self.training), generator=draw).split(self.options.batch):
                if len(chosen) == min(self.options.batch, len(self.training)):
                    yield self.training[chosen]

    def rotation(self, seed: int) -> str:
        return f"rotate{{{self.options.rotate},seed={seed}}}"

    def quantized(self, model: Any, before: str = "") -> float:
        """Quantizes the model in place, behind the passes `before`."""
        pipeline = f"raise,{before}quantize{{{self.options.quantize}}}"
        found = self.log_perplexity(fuseline.optimize(model, pipeline, target="eager"))
        release(self.device)
        return found

    def trained(self, seed: int, pipeline: str | None) -> tuple[Any, list[float]]:
        """The model with its adapters merged, and the loss of each step."""
        from peft import LoraConfig, get_peft_model

        rank = self.options.rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: Any = get_peft_model(copy.deepcopy(self.original), config)
        if pipeline is not None:
            fuseline.optimize(model, pipeline)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], self.options.lr)
        losses = []
        for _, ids in zip(range(self.options.steps), self.batches(seed)):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        if pipeline is not None and not fuseline.reports(model)[0].report["rotate"].matched:
            raise UserError("nothing was rotated")
        merged = model.merge_and_unload()
        release(self.device)
        return merged, torch.stack(losses).tolist()

    def fill(self, row: dict[str, Any], seed: int) -> None:
        row["original"] = self.log_perplexity(self.original)
        for name, before in (("lora", ""), ("rolora", f"{self.rotation(seed)},")):
            model, losses = self.trained(seed, f"raise,{before[:-1]}" if before else None)
            row |= {f"{name}_losses": losses, "loss_first": losses[0], "loss_last": losses[-1]}
            row[f"{name}_trained"] = self.log_perplexity(model)
            row[name] = self.quantized(model, before)
        row["gain"] = row["lora"] - row["rolora"]

    def untrained(self, row: dict[str, Any]) -> None:
        row["original"] = self.log_perplexity(self.original)
        row["lora"] = self.quantized(copy.deepcopy(self.original))
        row["rolora"] = self.quantized(copy.deepcopy(self.original), f"{self.rotation(self.options.seed[0])},")
        row["gain"] = row["lora"] - row["rolora"]


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    run, benchmark = Run("rolora", options, floors=False), Benchmark(options)
    rows = {f"seed {seed}": seed for seed in options.seed}
    run.check(("untrained", *rows))
    run.measure("untrained", benchmark.untrained)
    for name, seed in rows.items():
        run.measure(name, lambda row, seed=seed: benchmark.fill(row, seed))
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
