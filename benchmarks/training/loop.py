"""Training steps, captured as a CUDA graph where there is a GPU, and what a model makes of held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from fuseline.compiler.progress import steps

WARM_UP = 3


def loss_of(model: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next byte in nats, for windows [size, length + 1]."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())


class Trainer:
    """Forward and backward of one model on batches of one shape, as one CUDA graph where `graph` is true."""

    def __init__(self, model: torch.nn.Module, optimizer: Any, rate: float, graph: bool):
        self.model, self.optimizer, self.rate, self.graph = model, optimizer, rate, graph
        self.captured: torch.cuda.CUDAGraph | None = None
        self.batch = self.loss = torch.empty(0)

    def train(self, batches: Iterable[torch.Tensor], count: int, what: str, warm: int = 0) -> None:
        """`count` steps; the rate rises over `warm` steps, and falls to a tenth along half a cosine."""
        self.model.train()
        for number, batch in enumerate(steps(batches, what, total=count)):
            part = number / count
            rate = self.rate * min(1.0, (number + 1) / max(1, warm)) * (0.55 + 0.45 * math.cos(math.pi * part))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self._gradients(batch)
            self.optimizer.step()

    def _gradients(self, batch: torch.Tensor) -> None:
        if not self.graph:
            self.optimizer.zero_grad()
            loss_of(self.model, batch).backward()
            return
        if self.captured is None:
            self._capture(batch)
        self.batch.copy_(batch)
        self.captured.replay()  # type: ignore[union-attr]

    def _capture(self, batch: torch.Tensor) -> None:
        self.batch = batch.clone()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self.optimizer.zero_grad()
                loss_of(self.model, self.batch).backward()
        torch.cuda.current_stream().wait_stream(beside)
        self.optimizer.zero_grad()  # gradients are made anew inside, and stay where they are
        self.captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.captured):
            self.loss = loss_of(self.model, self.batch)
            self.loss.backward()


@torch.no_grad()
def held_out(model: torch.nn.Module, windows: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Cross-entropy in nats a byte and the share of bytes that are the most probable one."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in windows:
        logits = model(batch[:, :-1]).float()
        loss += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        right += int((logits.argmax(-1) == batch[:, 1:]).sum())
        count += batch[:, 1:].numel()
    return loss / count, right / count
