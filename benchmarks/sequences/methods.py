"""Ways to train on one long sequence: each makes a step, forward and backward on (ids, labels), that returns its loss.

Parameters, gradients and optimizer are sharded by `fully_shard` (FSDP2) in all of them, which averages gradients over
the ranks; losses are scaled so that the average is the gradient of the mean over all tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard

from .model import build, summed_loss, tile_mlps

PLAIN = F.scaled_dot_product_attention
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _model(options: argparse.Namespace, length: int, device: torch.device) -> torch.nn.Module:
    return build(options.shape, length, device, getattr(torch, options.dtype), options.checkpointing)


def _backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss.detach()


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


class _Body(torch.nn.Module):
    """Hidden states and loss in one forward, so that FSDP gathers the head's weights for both."""

    def __init__(self, causal: torch.nn.Module, tiles: int):
        super().__init__()
        self.causal, self.tiles = causal, tiles

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        hidden = self.causal.model(ids, position_ids=positions, use_cache=False).last_hidden_state
        return summed_loss(self.causal, hidden, labels, self.tiles)


def _by_hand(model: torch.nn.Module, tiles: int = 1) -> torch.nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(_Body(model, tiles))


def fsdp(options: argparse.Namespace, length: int, device: torch.device) -> tuple[torch.nn.Module, Step]:
    """FSDP2 alone: every rank has a whole sequence of its own."""
    body = _by_hand(_model(options, length, device))

    def step(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return _backward(body(ids, _shifted(labels), None) / (labels.numel() - labels.shape[0]))

    return body, step


def ulysses(
    options: argparse.Namespace, length: int, device: torch.device, tiles: int = 1
) -> tuple[torch.nn.Module, Step]:
    """DeepSpeed-Ulysses by hand: four all-to-alls around PyTorch's attention, on a block of the sequence."""
    world, rank = dist.get_world_size(), dist.get_rank()

    def exchange(x: torch.Tensor, there: int, back: int) -> torch.Tensor:
        """[B, H, S, D]: dimension `there` is cut, dimension `back` put together."""
        sent = torch.stack(x.chunk(world, there)).flatten(0, 1).contiguous()
        got = functional.all_to_all_single_autograd(sent, None, None, dist.group.WORLD)
        return torch.cat(got.unflatten(0, (world, -1)).unbind(), back)

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, **more: Any
    ) -> torch.Tensor:
        q, k, v = (exchange(x, 1, 2) for x in (q, k, v))
        return exchange(PLAIN(q, k, v, None, is_causal=True, scale=more.get("scale"), enable_gqa=True), 2, 1)

    torch.nn.functional.scaled_dot_product_attention = attention
    model = _model(options, length, device)
    if tiles > 1:
        tile_mlps(model, tiles)
    body = _by_hand(model, tiles)

    def step(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = _shifted(labels)
        count = (targets != -100).sum()
        block = ids.shape[1] // world
        mine = slice(rank * block, (rank + 1) * block)
        positions = torch.arange(mine.start, mine.stop, device=ids.device)[None]
        return _backward(body(ids[:, mine], targets[:, mine], positions) * world / count)

    return body, step


def alst(options: argparse.Namespace, length: int, device: torch.device) -> tuple[torch.nn.Module, Step]:
    """Ulysses by hand with MLPs and loss in tiles (Arctic Long Sequence Training, without its offloading)."""
    return ulysses(options, length, device, tiles=options.tiles)


def ring(options: argparse.Namespace, length: int, device: torch.device) -> tuple[torch.nn.Module, Step]:
    """PyTorch's `context_parallel`: keys and values go around, blocks balanced for causal masks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from transformers import AttentionInterface

    def attention(module: torch.nn.Module, q: Any, k: Any, v: Any, mask: Any, **more: Any) -> tuple[Any, None]:
        """Causal, without the mask that Hugging Face makes of positions: a ring takes none."""
        result = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=more.get("scaling"), enable_gqa=True)
        return result.transpose(1, 2), None

    AttentionInterface.register("ring", attention)
    world = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("cp",))
    model = _model(options, length, device)
    model.set_attn_implementation("ring")
    body = _by_hand(model)

    def step(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = _shifted(labels)
        count = (targets != -100).sum()
        ids, positions = ids.clone(), torch.arange(ids.shape[1], device=ids.device)[None].clone()
        buffers = [ids, targets, positions]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers)):
            return _backward(body(ids, targets, positions) * world / count)

    return body, step


def fuseline(options: argparse.Namespace, length: int, device: torch.device) -> tuple[torch.nn.Module, Step]:
    """`torch.compile(model, backend="fuseline")` with sequence-parallel, and `fully_shard` of the whole model."""
    torch._dynamo.reset()
    model = _model(options, length, device)
    settings = {"pipeline": options.pipeline, "target": options.target}
    model.compile(backend="fuseline", options=settings, dynamic=False)
    fully_shard(model)

    def step(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return _backward(model(input_ids=ids, labels=labels).loss)

    return model, step


def fuseline_ring(options: argparse.Namespace, length: int, device: torch.device) -> tuple[torch.nn.Module, Step]:
    """The same with keys and values going around the ranks."""
    around = options.pipeline.replace("sequence-parallel", "sequence-parallel{kind=ring}")
    return fuseline(argparse.Namespace(**{**vars(options), "pipeline": around}), length, device)


METHODS: dict[str, Callable[..., tuple[torch.nn.Module, Step]]] = {
    "fuseline": fuseline, "fsdp": fsdp, "ulysses": ulysses, "ring": ring, "alst": alst,
    "fuseline-ring": fuseline_ring,
}  # fmt: skip
