"""The model that is trained, its loss in chunks, and parameters that have no memory until the GPU is theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
SPREAD = 0.02  # the standard deviation of weights


class ChunkedLoss(torch.autograd.Function):
    """The mean cross entropy of hidden [S, H] through a head [V, H], CHUNK tokens at a time, gradients too."""

    @staticmethod
    def forward(ctx, hidden, head, targets):
        total = hidden.new_zeros((), dtype=torch.float32)
        by_hidden, by_head = torch.empty_like(hidden), torch.zeros_like(head)
        count = targets.numel()
        for h, t, g in zip(hidden.split(CHUNK), targets.split(CHUNK), by_hidden.split(CHUNK)):
            logits = (h @ head.t()).float()
            total += torch.nn.functional.cross_entropy(logits, t, reduction="sum") / count
            slope = torch.softmax(logits, -1, out=logits) if not logits.requires_grad else logits
            slope[torch.arange(len(t), device=t.device), t] -= 1
            slope = (slope / count).to(h.dtype)
            torch.mm(slope, head, out=g)
            by_head.addmm_(slope.t(), h)
        ctx.save_for_backward(by_hidden, by_head)
        return total

    @staticmethod
    def backward(ctx, grad):
        by_hidden, by_head = ctx.saved_tensors
        return by_hidden * grad, by_head * grad, None


class Stack(torch.nn.Module):
    """The decoder's hidden states, each layer checkpointed where that is asked for."""

    def __init__(self, shape: Any, blocks: bool):
        super().__init__()
        from fuseline.models.shapes import Decoder

        self.decoder, self.blocks = Decoder(shape, loss=False), blocks

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        from fuseline.models.decoder import angles

        d = self.decoder
        x = d.embed(ids)
        cos, sin = angles(ids.shape[1], d.shape.hidden // d.shape.heads, x)
        for layer in d.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False) if self.blocks else layer(x, cos, sin)
        return d.norm(x)


class Weights:
    """The parameters of a `Stack` and its head [V, H], bfloat16 on a GPU: shapes alone until `fill`, so that many
    processes compile beside one that runs."""

    def __init__(self, shape: Any, blocks: bool, device: torch.device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with torch.device("meta"):
            self.model = Stack(shape, blocks).to(dtype)
        self.bytes: dict[torch.nn.Parameter, int] = {}
        for module in self.model.modules():
            for name, given in list(module.named_parameters(recurse=False)):
                setattr(module, name, self.empty(given.shape, dtype, device))
        shared = self.model.decoder.embed.weight
        self.head = shared if shape.tied else self.empty(shared.shape, dtype, device)

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        storage = parameter.untyped_storage()
        self.bytes[parameter] = storage.nbytes()
        storage.resize_(0)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return parameter

    @torch.no_grad()
    def fill(self) -> None:
        """Gives all of them their memory: matrices from one seed, ones in the norms."""
        torch.manual_seed(0)
        for parameter, size in self.bytes.items():
            parameter.untyped_storage().resize_(size)
            parameter.normal_(std=SPREAD) if parameter.dim() > 1 else parameter.fill_(1)
