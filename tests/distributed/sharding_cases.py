"""What each of two processes runs for test_sharding.py: small models sharded by PyTorch, and the same models whole.

A case is a function that returns what its test reads, as JSON; what it raises comes back as text.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fuseline
from tests.helpers.models import Mlp, error

EXACT = "raise{allow_empty},fuse{allow_empty}"


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fully_sharded(mesh: DeviceMesh, **settings: Any) -> tuple[Stack, Stack, torch.Tensor]:
    """A stack sharded block by block, its copy, and an input that is the same on every rank."""
    model, reference, x = Stack(), *(Stack(), torch.randn(4, 8))
    reference.load_state_dict(copy.deepcopy(model.state_dict()))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings), reference, x


def train(model: nn.Module, reference: nn.Module, x: torch.Tensor, steps: int = 2) -> dict[str, float]:
    """Errors of the losses and of the parameters after a few steps of both."""
    ours = torch.optim.SGD(model.parameters(), 0.01)
    theirs = torch.optim.SGD(reference.parameters(), 0.01)
    losses = []
    for _ in range(steps):
        loss, expected = model(x).square().mean(), reference(x).square().mean()
        loss.backward()
        expected.backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(error(loss, expected))
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return {"loss": max(losses), "parameters": max(error(whole(p), q) for p, q in pairs)}


@torch.no_grad()
def fsdp_forward(mesh: DeviceMesh) -> dict[str, Any]:
    model, reference, x = fully_sharded(mesh)
    fuseline.optimize(model, EXACT)
    errors = [error(model(v), reference(v)) for v in (x, -x)]
    for block in model.blocks:
        block.reshard()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        p.mul_(-1.5)
        q.mul_(-1.5)
    errors.append(error(model(x), reference(x)))
    graphs = fuseline.reports(model)
    return {"error": max(errors), "captures": len(graphs), "raised": graphs[0].report["raise"].matched}


def fsdp_training(mesh: DeviceMesh) -> dict[str, Any]:
    model, reference, x = fully_sharded(mesh)
    return train(fuseline.optimize(model, EXACT), reference, x)


def fsdp_blocks_compiled_apart(mesh: DeviceMesh) -> dict[str, Any]:
    model, reference, x = fully_sharded(mesh)
    for block in model.blocks:
        block.compile(backend="fuseline", options={"pipeline": EXACT})
    return train(model, reference, x)


def fsdp_optimized_before(mesh: DeviceMesh) -> dict[str, Any]:
    model, reference, x = Stack(), Stack(), torch.randn(4, 8)
    reference.load_state_dict(copy.deepcopy(model.state_dict()))
    fuseline.optimize(model, EXACT)
    return train(fully_shard(model, mesh=mesh), reference, x)


@torch.no_grad()
def fsdp_quantized(mesh: DeviceMesh) -> dict[str, Any]:
    model, _, x = fully_sharded(mesh, reshard_after_forward=False)
    fuseline.optimize(model, "quantize{weights=int8}")(x)
    return {}


def tensor_parallel(mesh: DeviceMesh) -> tuple[Stack, Stack, torch.Tensor]:
    model, reference, x = Stack(), Stack(), torch.randn(4, 8)
    reference.load_state_dict(copy.deepcopy(model.state_dict()))
    plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    return model, reference, x


@torch.no_grad()
def dtensor_forward(mesh: DeviceMesh) -> dict[str, Any]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fuseline").addHandler(handler)
    model, reference, x = tensor_parallel(mesh)
    fuseline.optimize(model, EXACT)
    errors = [error(whole(model(v)), reference(v)) for v in (x, -x)]
    logging.getLogger("fuseline").removeHandler(handler)
    return {"error": max(errors), "told": told}


def dtensor_training(mesh: DeviceMesh) -> dict[str, Any]:
    model, reference, x = tensor_parallel(mesh)
    return train(fuseline.optimize(model, EXACT), reference, x)


@torch.no_grad()
def dtensor_quantized(mesh: DeviceMesh) -> dict[str, Any]:
    model, _, x = tensor_parallel(mesh)
    fuseline.optimize(model, "quantize{weights=int8}")(x)
    return {}


CASES: dict[str, list[Callable[[DeviceMesh], dict[str, Any]]]] = {
    "short": [fsdp_forward, fsdp_training, fsdp_quantized, dtensor_forward, dtensor_quantized],
    "long": [fsdp_blocks_compiled_apart, fsdp_optimized_before, dtensor_training],
}


def run(rank: int, world: int, folder: str, which: str) -> None:
    """Runs the cases of a list; rank 0 writes `results.json`. Every rank raises in the same cases, so none waits for
    another."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    results: dict[str, Any] = {}
    for case in CASES[which]:
        torch.compiler.reset()
        torch.manual_seed(0)
        try:
            results[case.__name__] = case(mesh)
        except Exception as problem:
            results[case.__name__] = {"raised": str(problem)}
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
