"""A trial: a small model through `torch.compile(backend="fuseline")`, held against eager."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from ..backend import compile as compile_backend
from .finding import BROKEN, OK, Finding

BOUND = 1e-4


class Block(torch.nn.Module):
    """A norm, a gated unit and a residual: [batch, 64] → [batch, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(64)
        self.gate, self.up, self.down = (torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))


def trial() -> Iterator[Finding]:
    """Captures, rewrites and runs a block, on the GPU through Triton where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Block().eval().to(device), torch.randn(8, 64).to(device)
    began = time.perf_counter()
    try:
        with torch.no_grad():
            expected = model(x)
            found = torch.compile(model, backend=compile_backend, options={"pipeline": "raise,fuse"})(x)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
    except Exception as failure:
        inner = getattr(failure, "inner_exception", None) or failure.__cause__ or failure  # Dynamo wraps a backend's
        first = (str(inner).strip().splitlines() or [type(inner).__name__])[0]
        yield Finding(
            "trial", BROKEN, f"a small model fails on {device}: {first}", "so will yours", "fuseline doctor --debug"
        )
        return
    seconds = time.perf_counter() - began
    right = error <= BOUND
    yield Finding(
        "trial",
        OK if right else BROKEN,
        f"a small model was compiled and run on {device} in {seconds:.1f} s, error {error:.1e}",
        "" if right else f"results are off by more than {BOUND:.0e}",
        None if right else "fuseline compare demo:tiny-decoder -p raise,fuse",
    )
