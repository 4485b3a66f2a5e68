"""Who is right: the rules by which AutoSP (DeepSpeed, 2026) cuts a sequence, or `sequence-parallel`, case by case.

    python benchmarks/autosp_rules.py                  some minutes on a CPU, in four processes
    python benchmarks/autosp_rules.py --rules-only     one process, AutoSP's rules alone; seconds

What DeepSpeed's `deepspeed/compile/passes/sp_compile.py` does (read at commit edaa7221) is followed in one process, on
a small decoder in float64: token ids and labels are cut into blocks of ⌊S / P⌋ before the model shifts the labels, each
rank takes the mean over its own targets, and the ranks' gradients and losses are averaged; heads are dealt out by a
view that needs both numbers to divide by P; an attention's first three arguments are exchanged one after another, each
in all uses of its node, so that a node which is keys and values at once is exchanged twice. Masks stay whole and are
right; positions are taken to be right too, though AutoSP asks the caller for them. `sequence-parallel` runs as it is,
on four processes over gloo. Beside both is the model as it stands; right is who agrees with it within 1e-9.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.distributed.sequence_models import VOCABULARY, Decoder, batch

DEGREE = 4
BOUND = 1e-9
CASES: dict[str, dict[str, Any]] = {
    "labels that nobody shifts": {"shifted": False},
    "every label counts": {},
    "the same, a batch of 3": {"size": 3},
    "a second length, 48": {"length": 48},
    "length 63": {"length": 63},
    "prompt of half the sequence": {"prompt": 32},
    "prompt of 10 tokens": {"prompt": 10},
    "one row padded by 20": {"size": 3, "padding": 20},
    "two documents": {"documents": True},
    "sliding window of 8": {"window": 8},
    "tied embeddings": {"tied": True},
    "weighted classes, smoothed": {"smoothing": 0.1, "weighted": True},
    "keys that are values": {"shared": True},
    "8 key heads of 8": {"heads": 8, "keys": 8},
    "2 key heads": {"keys": 2},
    "1 key head": {"keys": 1},
    "9 heads": {"heads": 9, "keys": 9},
}
SETTINGS = ("window", "tied", "shared", "smoothing")


class Plain(torch.nn.Module):
    """The decoder, and a loss against labels as they are."""

    def __init__(self, inner: Decoder):
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.inner(ids).view(-1, VOCABULARY), labels.reshape(-1))


def case_of(name: str) -> tuple[torch.nn.Module, Decoder, dict[str, Any], dict[str, Any]]:
    """A case's model, the decoder in it, what it is called with, and its settings; the same in every process."""
    case = CASES[name]
    torch.manual_seed(0)
    heads = case.get("heads", 4)
    given = {k: v for k, v in case.items() if k in SETTINGS}
    decoder = Decoder(heads=heads, keys=case.get("keys", heads), **given).double()
    length, size = case.get("length", 64), case.get("size", 1)
    inputs = batch(size, length, case.get("prompt", 0))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if padding := case.get("padding"):
        inputs["labels"][-1, length - padding :] = -100
        keys = torch.arange(length) < torch.tensor([length] * (size - 1) + [length - padding])[:, None]
        inputs["mask"] = causal & keys[:, None, None, :]
    if case.get("documents"):
        second = torch.arange(length) >= 20
        inputs["mask"] = causal & (second[:, None] == second[None, :])
    if case.get("weighted"):
        inputs["weight"] = torch.rand(VOCABULARY).double() + 0.1
    model = decoder if case.get("shifted", True) else Plain(decoder)
    return model, decoder, inputs, case


def by_autosp(model: Decoder, inputs: dict[str, Any], case: dict[str, Any]) -> torch.Tensor:
    """The loss that AutoSP's ranks report on average, whose gradient DeepSpeed averages too."""
    if case.get("shared"):
        raise ValueError("keys and values are one node, and exchanged twice")
    for name, heads in (("query", model.heads), ("key", model.keys)):
        if heads % DEGREE:
            raise ValueError(f"no view of {heads} {name} heads for {DEGREE} ranks")
    block = inputs["ids"].shape[1] // DEGREE
    cut = {name: inputs[name][:, : block * DEGREE] for name in ("ids", "labels")}
    mask = inputs.get("mask")
    logits = model(cut["ids"], mask=mask)
    losses = []
    for rank in range(DEGREE):
        mine = slice(rank * block, (rank + 1) * block)
        target = cut["labels"][:, mine]
        if case.get("shifted", True):
            target = F.pad(target, (0, 1), value=-100)[:, 1:]  # the shift, within the block
        rows = logits[:, mine].reshape(-1, VOCABULARY)
        losses.append(
            F.cross_entropy(rows, target.reshape(-1), inputs.get("weight"), label_smoothing=case.get("smoothing", 0.0))
        )
    return torch.stack(losses).mean()


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def on_a_rank(rank: int, folder: str) -> None:
    """`sequence-parallel` in one of the processes: for each case the loss, and how far its gradient is off."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=DEGREE)
    found: dict[str, Any] = {}
    for name in CASES:
        torch.compiler.reset()
        model, _, inputs, _ = case_of(name)
        whole = copy.deepcopy(model)
        run = torch.compile(model, backend="fuseline", options={"pipeline": "sequence-parallel"})
        loss = run(**inputs)
        off = apart(gradient(model, loss), gradient(whole, whole(**inputs)))
        found[name] = {"loss": loss.item(), "off": off}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def rows(ours: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One a case: losses, how far gradients are off, and who is right."""
    result = []
    for name in CASES:
        model, decoder, inputs, case = case_of(name)
        right = model(**inputs)
        wanted = gradient(model, right)
        row: dict[str, Any] = {"case": name, "one process": f"{right.item():.4f}"}
        off = float("inf")
        try:
            loss = by_autosp(decoder, inputs, case)
            off = apart(gradient(model, loss), wanted)
            row["AutoSP's rules"] = f"{loss.item():.4f}"
            row["gradient off by"] = "NaN" if off != off else f"{off:.1%}"
        except ValueError as error:
            row["AutoSP's rules"], row["gradient off by"] = f"error: {error}", ""
        held = {"AutoSP": off <= BOUND}
        if ours is not None:
            row["Fuseline off by"] = f"{ours[name]['off']:.0e}"
            held["Fuseline"] = ours[name]["off"] <= BOUND and abs(ours[name]["loss"] - right.item()) <= BOUND
        row["right"] = " and ".join(who for who, is_right in held.items() if is_right) or "nobody"
        result.append(row)
    return result


def show(found: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in found[0]:
        table.add_column(heading)
    for row in found:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="AutoSP's rules and sequence-parallel, on the same cases.")
    parser.add_argument("--rules-only", action="store_true", help="AutoSP's rules alone, in one process")
    options = parser.parse_args()
    ours = None
    if not options.rules_only:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(on_a_rank, (folder,), nprocs=DEGREE)
            ours = json.loads((Path(folder) / "found.json").read_text())
    show(rows(ours))


if __name__ == "__main__":
    main()
