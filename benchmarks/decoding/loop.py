"""The decode loop: one token a step, fed back on the device, the host never waiting for it.

A step is given what `generate()` gives the model at each step (one token, its position, the static cache and the mask
over its slots), so that both run one and the same compilation; position and mask are advanced in place by two small
kernels, and argmax writes the next token where the step reads it. With `inputs="forward"` the model is given the
token and the cache alone, and works out position and mask by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import Timing, synchronize
from harness.timing import stopwatch

from .model import State, static_cache

INPUTS = ("generate", "forward")
WARMUP = 8  # steps: the first compiles, the next ones warm up and record what is replayed later
Call = Callable[..., Any]


@dataclass(frozen=True)
class Decoded:
    """What the steps took: seconds a step on the device, and seconds that the host needed to issue a step."""

    step: Timing
    host: Timing


class Loop:
    """Greedy decoding of one model from one state.

    Args:
        model: whose config, dtype and `prepare_inputs_for_generation` are used.
        call: the model itself or a compiled call of it.
        capacity: slots of the static cache.
    """

    def __init__(self, model: Any, call: Call, state: State, capacity: int, inputs: str = "generate"):
        self.call, self.state = call, state
        self.device = state.token.device
        self.cache = static_cache(model, len(state.token), capacity, self.device)
        self.token = state.token.clone()
        self.inputs: dict[str, Any] = {"input_ids": self.token, "past_key_values": self.cache, "use_cache": True}
        self.given = inputs == "generate"
        if self.given:
            self.position = torch.full_like(self.token, state.length)
            state.fill(self.cache)
            seen = torch.ones(len(state.token), state.length + 1, dtype=torch.int64, device=self.device)
            prepared = model.prepare_inputs_for_generation(
                torch.cat([state.prompt, state.token], 1),
                next_sequence_length=1,
                past_key_values=self.cache,
                attention_mask=seen,
                position_ids=self.position,
            )
            self.mask = prepared["attention_mask"].clone(memory_format=torch.preserve_format)
            self.slots = torch.arange(capacity, device=self.device).expand(self.mask.shape)
            self.inputs |= {
                "position_ids": self.position,
                "attention_mask": self.mask,
                "logits_to_keep": 1,
                "return_dict": True,
            }
        self.restart()

    def restart(self) -> None:
        """Back to the state after the prompt, every tensor in its place."""
        self.state.fill(self.cache)
        self.token.copy_(self.state.token)
        if self.given:
            self.position.fill_(self.state.length)
            self.look()

    def look(self) -> None:
        torch.le(self.slots, self.position[:, :, None, None], out=self.mask)

    def step(self) -> torch.Tensor:
        """One step; returns the last position's logits [batch, vocabulary]."""
        logits = self.call(**self.inputs).logits[:, -1]
        torch.argmax(logits, -1, keepdim=True, out=self.token)
        if self.given:
            self.position.add_(1)
            self.look()
        return logits

    @torch.no_grad()
    def warm_up(self) -> float:
        """The first steps; seconds until they were done, compilation included."""
        began = time.perf_counter()
        self.restart()
        for _ in range(WARMUP):
            self.step()
        synchronize(self.device)
        return time.perf_counter() - began

    @torch.no_grad()
    def tokens(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first step's logits, float32 on the host, and the greedy tokens [batch, steps], from the prompt's end."""
        self.restart()
        first, found = None, []
        for _ in range(steps):
            logits = self.step()
            first = logits.float().cpu() if first is None else first
            found.append(self.token.clone())
        assert first is not None
        return first, torch.cat(found, 1).cpu()

    @torch.no_grad()
    def forced(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, steps, vocabulary], on the host, of steps that are given ids [batch, steps] one by one."""
        self.restart()
        found = []
        for token in ids.split(1, 1):
            self.token.copy_(token)
            found.append(self.step().cpu())
        return torch.stack(found, 1)

    @torch.no_grad()
    def timed(self, steps: int, repeats: int) -> Decoded:
        """Repeats of `steps` steps from the prompt's end."""
        start, seconds, host = stopwatch(self.device), [], []
        for _ in range(repeats):
            self.restart()
            synchronize(self.device)
            stop = start()
            for _ in range(steps):
                began = time.perf_counter()
                self.step()
                host.append(time.perf_counter() - began)
            seconds.append(stop() / steps)
        return Decoded(Timing(tuple(seconds)), Timing(tuple(host)))
