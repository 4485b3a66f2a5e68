"""What each process runs for test_sequence_checkpoint.py: two steps and a checkpoint; then two more, on other ranks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.distributed.sequence_cases import PIPELINE, decoder
from tests.distributed.sequence_models import batch

STEPS = 4


def batches() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return [batch(2, length, prompt=5) for length in (11, 12, 11, 14)]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: slice) -> None:
    for inputs in batches()[steps]:
        model(**inputs).backward()
        optimizer.step()
        optimizer.zero_grad()


def made(wrapped: bool, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = decoder()
    model.compile(backend="fuseline", options={"pipeline": PIPELINE})
    if wrapped:
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def run(rank: int, world: int, folder: str, stage: str, wrapped: bool) -> None:
    """stage: "save" trains from the start and saves, "load" goes on in a model that began otherwise."""
    torch.set_num_threads(1)
    logging.getLogger("fuseline").setLevel(logging.ERROR)
    dist.init_process_group("gloo", f"file://{folder}/{stage}", rank=rank, world_size=world)
    saved = Path(folder) / "checkpoint"
    model, optimizer = made(wrapped, 0 if stage == "save" else 7)
    if stage == "save":
        trained(model, optimizer, slice(0, 2))
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=saved)
    else:
        weights, states = get_state_dict(model, optimizer)
        found = {"model": weights, "optimizer": states}
        dcp.load(found, checkpoint_id=saved)
        set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
        trained(model, optimizer, slice(2, STEPS))
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
        torch.manual_seed(0)
        reference = decoder()
        trained(reference, torch.optim.AdamW(reference.parameters(), 1e-2), slice(0, STEPS))
        pairs = zip(whole, reference.parameters(), strict=True)
        error = max(float((p - q).detach().abs().max() / q.detach().abs().max()) for p, q in pairs)
        if rank == 0:
            (Path(folder) / "results.json").write_text(json.dumps({"error": error}))
    dist.barrier()
    dist.destroy_process_group()
