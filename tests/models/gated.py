"""A gated unit over codes as GPTQ and AWQ checkpoints have them, and what it computes in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fuseline.models import awq, gptq
from fuseline.models.coded import CodedLinear
from tests.models.checkpoints import awq_words, stream

CASES: dict[str, tuple[str, int, dict[str, bool]]] = {
    "gptq 4 bits": ("gptq", 4, {}),
    "gptq 3 bits, ordered": ("gptq", 3, {"ordered": True}),
    "gptq 2 bits, symmetric": ("gptq", 2, {"symmetric": True}),
    "gptq 8 bits": ("gptq", 8, {}),
    "awq": ("awq", 4, {}),
}


def linear(method: str, bits: int, group: int, out: int, channels: int, **options: bool) -> tuple[Any, torch.Tensor]:
    """A linear over random words, and its weight in float64, columns as the checkpoint has them."""
    rng = np.random.default_rng(bits)
    groups = channels // group
    codes, zeros = rng.integers(0, 2**bits, (channels, out)), rng.integers(1, 2**bits, (groups, out))
    if options.get("symmetric"):
        zeros[:] = 2 ** (bits - 1)
    scales = (rng.uniform(0.5, 1, (groups, out)) / 2**bits / channels**0.5).astype(np.float16)
    index = np.arange(channels) // group
    if options.get("ordered"):
        index = rng.permutation(index)
    like = torch.nn.Linear(channels, out)
    one = {"bits": bits, "group": group, "scales": "F16", "indices": True, "channels": channels}
    if method == "awq":
        stored: Any = awq.AwqLinear(like, one)
        parts = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}
    else:
        read = {"zeros_as_they_are": False, "planes": False, "symmetric": False, "ordered": False} | options
        stored = gptq.GptqLinear(like, one, read)
        parts = {"qweight": stream(codes, bits), "qzeros": stream((zeros - 1).T, bits).T, "scales": scales}
        parts["g_idx"] = index.astype(np.int32)
    state = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
    stored.load_state_dict(state | {"bias": like.bias.detach()}, assign=True)
    weight = (codes - zeros[index]) * scales[index].astype(np.float64)
    return stored.finished("w"), torch.from_numpy(weight.T.copy())


class Gated(torch.nn.Module):
    def __init__(self, gate: CodedLinear, up: CodedLinear, down: CodedLinear):
        super().__init__()
        self.norm = torch.nn.RMSNorm(128, eps=1e-5)
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def gated(case: str) -> tuple[Gated, dict[str, torch.Tensor]]:
    """128 → 192 → 128, and the weights in float64."""
    method, bits, options = CASES[case]
    torch.manual_seed(0)
    shapes = {"gate": (192, 128), "up": (192, 128), "down": (128, 192)}
    made = {name: linear(method, bits, 32, *shape, **options) for name, shape in shapes.items()}
    return Gated(**{name: one[0] for name, one in made.items()}).eval(), {name: one[1] for name, one in made.items()}


def reading(compilation: Any) -> list[str]:
    """The ops by which kernels read codes: those of 4 and 8 bits stay bytes, others are laid out in words."""
    ops = [op for kernel in compilation.kernels for op in kernel.ops]
    return [op for op in ops if "decode_words" in op or "dequantize" in op]


def exact(model: Gated, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The same on the CPU in float64."""
    x = x.double().cpu()
    product = lambda value, name: F.linear(value, weights[name], getattr(model, name).bias.double().cpu())
    h = F.rms_norm(x, (128,), eps=1e-5)
    return x + product(F.silu(product(h, "gate")) * product(h, "up"), "down")
