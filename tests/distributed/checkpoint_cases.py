"""What each of two processes runs for test_checkpoint.py: training steps with and without `checkpoint`.

A case returns what its test reads, as JSON; what it raises comes back as text. All ranks run the same cases.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fuseline.compiler import joint as joint_level
from fuseline.models.decoder import Block
from fuseline.passes.checkpointing import Policy
from tests.checkpointing.test_exact import keeps_products

VOCABULARY, WIDTH, BLOCKS = 40, 16, 4
SEQUENCE = "raise,sequence-parallel"


class Decoder(nn.Module):
    """Blocks in a row and a loss. region: how every other block is checkpointed by its user, if at all."""

    def __init__(self, region: str = "") -> None:
        super().__init__()
        self.region = region
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.blocks = nn.ModuleList(Block(WIDTH, 2 * WIDTH, 4, 2) for _ in range(BLOCKS))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        contexts = partial(create_selective_checkpoint_contexts, keeps_products)
        for i, block in enumerate(self.blocks):
            if not self.region or i % 2:
                x = block(x)
            elif self.region == "whole":
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (1, 64))
    return ids, ids.roll(-1, 1)


class Watched:
    """The backward graphs that are split off while this is entered."""

    def __enter__(self) -> Watched:
        self.split, self.backward = joint_level.Joint.split, []

        def split(joint: Any, *args: Any, **given: Any) -> Any:
            graphs = self.split(joint, *args, **given)
            self.backward.append(graphs[1])
            return graphs

        joint_level.Joint.split = split  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: Any) -> None:
        joint_level.Joint.split = self.split  # type: ignore[method-assign]

    def count(self, word: str) -> int:
        """Calls in them whose op has that name."""
        return sum(word in str(n.target) for g in self.backward for n in g.graph.nodes if n.op == "call_function")


def step(
    model: nn.Module, inputs: Any, pipeline: str, prepare: Callable[[nn.Module], Any] = lambda model: None
) -> tuple[list[torch.Tensor], Watched]:
    """The loss and every gradient of one step by a copy of the model, and the backward graphs behind them."""
    torch.compiler.reset()
    model = copy.deepcopy(model)
    prepare(model)
    model.compile(backend="fuseline", options={"pipeline": pipeline}, dynamic=False)
    with Watched() as watched:
        loss = model(*inputs)
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return [loss.detach(), *whole], watched


def compared(
    before: str, choices: list[str], region: str = "", prepare: Callable[[nn.Module], Any] = lambda model: None
) -> dict[str, Any]:
    """For each choice of `checkpoint`, whether the step is the same bit by bit as without, and what runs in it."""
    model, inputs = Decoder(region), batch()
    theirs, _ = step(unmarked(model), inputs, before, prepare)
    found: dict[str, Any] = {"gradients": len(theirs)}
    for choice in choices:
        ours, watched = step(model, inputs, f"{before},{choice}" if choice else before, prepare)
        equal = len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))
        found[choice or "region"] = {"equal": equal, **counts(watched)}
    return found


def unmarked(model: Decoder) -> Decoder:
    """The same model, none of whose blocks its user checkpoints."""
    plain = copy.deepcopy(model)
    plain.region = ""
    return plain


def counts(watched: Watched) -> dict[str, int]:
    return {"exchanges": watched.count("all_to_all"), "attention": watched.count("_scaled_dot_product_flash_attention"),
            "products": watched.count("mm."), "hosted": watched.count("from_host")}  # fmt: skip


NONE = "checkpoint{policy=none}"
KEEP = "checkpoint{policy=full,collectives=keep}"
RERUN = "checkpoint{policy=full,collectives=rerun}"
LONG = "checkpoint{policy=long-context,collectives=keep}"
OFFLOAD = "checkpoint{policy=budget,memory=0.9,offload=cpu,collectives=rerun}"


def with_sequence_parallel() -> dict[str, Any]:
    return compared(SEQUENCE, [NONE, KEEP, RERUN, OFFLOAD])


def with_a_ring() -> dict[str, Any]:
    return compared("raise,sequence-parallel{kind=ring}", [RERUN])


def with_fully_shard() -> dict[str, Any]:
    return compared("raise", ["checkpoint{policy=full}", "checkpoint{policy=min-cut}"], prepare=fully_shard)


def with_both() -> dict[str, Any]:
    return compared(SEQUENCE, [LONG], prepare=fully_shard)


def in_regions() -> dict[str, Any]:
    return compared(SEQUENCE, ["", LONG], region="whole")


def in_regions_with_a_policy() -> dict[str, Any]:
    return compared(SEQUENCE, ["", LONG], region="policy")


def plans_that_differ() -> dict[str, Any]:
    """The second rank would keep all; it does as the first, which exchanges again."""
    from fuseline.passes import checkpointing

    choose = checkpointing.choose
    if dist.get_rank() == 1:
        checkpointing.choose = lambda problem, policy, limit: choose(problem, Policy.NONE)  # type: ignore[assignment]
    try:
        found = compared(SEQUENCE, [RERUN])
    finally:
        checkpointing.choose = choose
    every: list[Any] = [None, None]
    dist.all_gather_object(every, found[RERUN])
    return {**found, "second": every[1]}


CASES: list[Callable[[], dict[str, Any]]] = [
    with_both, in_regions_with_a_policy, with_sequence_parallel, with_fully_shard, in_regions, with_a_ring,
    plans_that_differ,
]  # fmt: skip


def run(rank: int, world: int, folder: str, which: str = "") -> None:
    """Runs every case; rank 0 writes `results.json`."""
    torch.set_num_threads(1)
    logging.getLogger("fuseline").setLevel(logging.ERROR)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for case in CASES:
        if which and case.__name__ != which:
            continue
        torch.manual_seed(0)
        try:
            results[case.__name__] = case()
        except Exception as problem:
            results[case.__name__] = {"raised": f"{type(problem).__name__}: {problem}"}
        if rank == 0:
            (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
