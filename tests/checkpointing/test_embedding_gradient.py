"""The gradient of an embedding under `checkpoint` and Inductor: no second table in float32, and the plan knows it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from fuseline.compiler.costs import workspace
from fuseline.compiler.ops import embedding_gradient
from fuseline.compiler.ops.embedding_gradient import AT_A_TIME, columns_at_a_time
from tests.helpers.models import error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [-1, 3])
def test_each_row_is_the_sum_over_its_tokens(monkeypatch, dtype, padding):
    """Some columns at a time, the last ones fewer; a row that is read often is not summed in 16 bits."""
    monkeypatch.setattr(sys.modules[columns_at_a_time.__module__], "AT_A_TIME", 4 * 50 * 64)
    grad = torch.randn(3, 700, 200, dtype=dtype)
    indices = torch.randint(0, 50, (3, 700)).where(torch.rand(3, 700) < 0.5, 7)
    assert columns_at_a_time(50, 200) == 64
    found = embedding_gradient(grad, indices, 50, padding)
    wanted = torch.ops.aten.embedding_dense_backward(grad.double(), indices, 50, padding, False)
    assert found.dtype == dtype and error(found, wanted) < (4e-3 if dtype == torch.bfloat16 else 6e-4)


def test_sums_stay_within_the_limit():
    for rows, width in ((128256, 4096), (49152, 576), (32000, 4096), (262144, 3584), (10, 7)):
        columns = columns_at_a_time(rows, width)
        assert 0 < columns <= width
        assert columns in (64, width) or 4 * rows * columns <= AT_A_TIME
    assert 4 * 128256 * columns_at_a_time(128256, 4096) <= AT_A_TIME


class Model(nn.Module):
    def __init__(self, freely: bool = False):
        super().__init__()
        self.embed = nn.Embedding(96, 32, padding_idx=5, scale_grad_by_freq=freely)
        self.one, self.two = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids):
        x = self.embed(ids)
        return x + self.two(torch.nn.functional.silu(self.one(x)))


@pytest.mark.parametrize(("dtype", "freely", "ours"), [
    (torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.float32, False, False),
])  # fmt: skip
def test_inductor_calls_it_for_16_bits(dtype, freely, ours):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, exact = Model(freely).to(dtype), Model(freely).double()
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(0, 96, (2, 40))
    record = []
    options = {"pipeline": "raise{allow_empty},checkpoint{policy=full}", "target": "inductor", "record": record.append}
    torch.compile(model, backend="fuseline", options=options)(ids).float().square().sum().backward()
    exact(ids).square().sum().backward()
    calls = [n for n in record[-1].joint.module.graph.nodes if n.target is embedding_gradient.overload]
    assert len(calls) == ours
    assert all(workspace(n) == 4 * columns_at_a_time(96, 32) * (96 + 80) for n in calls)
    limit = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert error(p.grad, q.grad) < limit, name
    assert not model.embed.weight.grad[5].any()
