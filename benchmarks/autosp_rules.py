"""Who is right: the rules by which AutoSP (DeepSpeed, 2026) cuts a sequence, put to cases that models are trained on.

    python benchmarks/autosp_rules.py            a minute on a CPU; nothing but PyTorch is run

What DeepSpeed's `deepspeed/compile/passes/sp_compile.py` does (read at commit edaa7221) is followed in one process, on
a small decoder in float64: token ids and labels are cut into blocks of ⌊S / P⌋ before the model shifts the labels, each
rank takes the mean over its own targets, and the ranks' gradients and losses are averaged; heads are dealt out by a
view that needs both numbers to divide by P. Beside it the model as it stands. `sequence-parallel` is held to the
latter within 1e-9 in the same cases, and more, by tests/distributed/test_sequence_parallel.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.distributed.sequence_models import VOCABULARY, Decoder, batch

CASES: dict[str, dict[str, Any]] = {
    "every label counts": {"length": 64, "degree": 4},
    "prompt of half the sequence": {"length": 64, "degree": 4, "prompt": 32},
    "prompt of 10 tokens": {"length": 64, "degree": 4, "prompt": 10},
    "length 63": {"length": 63, "degree": 4},
    "2 key heads, degree 4": {"length": 64, "degree": 4, "keys": 2},
    "9 heads, degree 4": {"length": 64, "degree": 4, "heads": 9, "keys": 9},
}


def by_autosp(model: Decoder, inputs: dict[str, Any], degree: int) -> torch.Tensor:
    """The loss that AutoSP's ranks report on average, whose gradient DeepSpeed averages too."""
    for name, heads in (("query", model.heads), ("key", model.keys)):
        if heads % degree:
            raise ValueError(f"no view of {heads} {name} heads for {degree} ranks")
    block = inputs["ids"].shape[1] // degree
    cut = {name: tensor[:, : block * degree] for name, tensor in inputs.items()}
    logits = model(cut["ids"])
    losses = []
    for rank in range(degree):
        mine = slice(rank * block, (rank + 1) * block)
        target = F.pad(cut["labels"][:, mine], (0, 1), value=-100)[:, 1:]  # the shift, within the block
        losses.append(F.cross_entropy(logits[:, mine].reshape(-1, VOCABULARY), target.reshape(-1)))
    return torch.stack(losses).mean()


def gradient(model: Decoder, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def main() -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("case", "one process", "AutoSP's rules", "gradient off by"):
        table.add_column(heading)
    for name, case in CASES.items():
        torch.manual_seed(0)
        model = Decoder(heads=case.get("heads", 4), keys=case.get("keys", 4)).double()
        inputs = batch(1, case["length"], case.get("prompt", 0))
        right = model(**inputs)
        wanted = gradient(model, right)
        try:
            loss = by_autosp(model, inputs, case["degree"])
            off = (gradient(model, loss) - wanted).abs().max() / wanted.abs().max()
            row = (f"{loss.item():.4f}", "NaN" if off.isnan() else f"{off.item():.1%}")
        except ValueError as error:
            row = (f"error: {error}", "")
        table.add_row(name, f"{right.item():.4f}", *row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
