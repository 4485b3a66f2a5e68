"""A training step through `torch.compile(model, backend="fuseline")`, beside the same step in eager.

    python examples/backend.py

Nothing but torch is imported: the backend is found by its name.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F


class Block(torch.nn.Module):
    """A norm, a gated MLP and a residual, as many models write them."""

    def __init__(self, width: int = 64, inner: int = 128):
        super().__init__()
        self.norm = torch.nn.RMSNorm(width)
        self.gate = torch.nn.Linear(width, inner, bias=False)
        self.up = torch.nn.Linear(width, inner, bias=False)
        self.down = torch.nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def step(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One forward and backward pass; the loss."""
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss.detach()


def main() -> None:
    torch.manual_seed(0)
    eager = torch.nn.Sequential(Block(), Block(), torch.nn.Linear(64, 8))
    model = copy.deepcopy(eager)
    compilations = []
    compiled = torch.compile(
        model,
        backend="fuseline",
        options={"pipeline": "raise,fuse", "record": compilations.append},
    )
    x, y = torch.randn(16, 64), torch.randn(16, 8)
    expected, found = step(eager, x, y), step(compiled, x, y)
    gap = max(
        ((p.grad - q.grad).abs().max() / q.grad.abs().max()).item()
        for p, q in zip(model.parameters(), eager.parameters(), strict=True)
    )
    print(f"loss        {found:.6f}, eager {expected:.6f}")
    print(f"gradients   differ by at most {gap:.1e} of the largest in their tensor")
    for compilation in compilations:
        for record in compilation.report.passes:
            print(f"{record.name:10}  {record.matched} sites: {record.rules}")
    assert abs(found - expected) <= 1e-5 * abs(expected) and gap <= 1e-5


if __name__ == "__main__":
    main()
