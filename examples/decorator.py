"""`fuseline.optimize` as a decorator of a class and as a function on a model.

    python examples/decorator.py

Either way the model stays the object it was: same parameters, same `state_dict()`, same hooks.
"""

from __future__ import annotations

import torch

import fuseline


@fuseline.optimize("raise,fuse")
class Classifier(torch.nn.Module):
    """Every instance is compiled at its first call."""

    def __init__(self, width: int = 32, classes: int = 4):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.body = torch.nn.Linear(width, 4 * width)
        self.head = torch.nn.Linear(4 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.gelu(self.body(self.norm(x))))


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 32)
    model = Classifier()
    with torch.no_grad():
        exact = model(x)
        with torch.compiler.set_stance("force_eager"):
            eager = model(x)
    (compilation,) = fuseline.reports(model)
    print("decorator ", compilation.report.pipeline, {p.name: p.matched for p in compilation.report.passes})
    print("state_dict", list(model.state_dict()))

    # The same model again, with a lossy pass: it runs because it is named.
    fuseline.optimize(model, "quantize{weights=int8}")
    with torch.no_grad():
        rounded = model(x)
    (compilation,) = fuseline.reports(model)
    error = ((rounded - eager).abs().max() / eager.abs().max()).item()
    print("function  ", compilation.report.pipeline, f"error {error:.1e}")

    # A weight edited in place is noticed at the next call.
    with torch.no_grad():
        model.head.weight.mul_(2)
        model.head.bias.mul_(2)
        doubled = model(x)
    print("edited    ", f"outputs doubled within {(doubled - 2 * rounded).abs().max():.1e}")
    assert torch.allclose(exact, eager, atol=1e-5) and 0 < error < 0.05
    assert torch.allclose(doubled, 2 * rounded, atol=1e-5)


if __name__ == "__main__":
    main()
