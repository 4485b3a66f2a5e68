"""A quantized convolution under Triton: the codes are expanded by a kernel, the convolution itself is PyTorch's."""

from __future__ import annotations

import torch
from torch import nn

import fuseline
from tests.helpers.models import error

PIPELINE = "quantize{weights=int8},fuse{allow_empty}"


@torch.no_grad()
def test_the_result_is_that_of_eager() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=4, bias=False)
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(torch.relu(self.first(x))).mean((-1, -2)))

    torch.manual_seed(0)
    eager, kernels, x = Net().eval(), Net().eval(), torch.randn(2, 3, 9, 9)
    kernels.load_state_dict(eager.state_dict())
    fuseline.optimize(eager, PIPELINE, target="eager")
    fuseline.optimize(kernels, PIPELINE, target="triton")
    assert error(kernels(x), eager(x)) < 1e-5
    (compilation,) = fuseline.reports(kernels)
    assert compilation.report["quantize"].rules == {"convolution": 2, "linear": 1} and not compilation.refusals
