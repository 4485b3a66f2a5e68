"""fuseline::ring_attention on one GPU, a ring of one: PyTorch's flash attention by its own operators, and its backward.

Several blocks are joined in tests/distributed/test_sequence_parallel.py, on CPUs; with two GPUs the benchmark
`benchmarks/sequence_parallel.py --methods fuseline-ring ulysses` holds losses against one another.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fuseline.compiler import compat
from fuseline.compiler.ops import ring_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed"),
]


@pytest.fixture
def group() -> Iterator[str]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield compat.group_name(dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("causal", [True, False])
def test_one_rank(group: str, causal: bool) -> None:
    torch.manual_seed(0)
    shapes = ((2, 8, 256, 64), (2, 2, 256, 64), (2, 2, 256, 64))
    ours = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    weight = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    found = ring_attention(*ours, 0.125, causal, 256, 0, 1, group)[0]
    expected = F.scaled_dot_product_attention(*theirs, is_causal=causal, scale=0.125, enable_gqa=True)
    (found * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    close = lambda a, b: float((a.double() - b).abs().max() / b.abs().max()) < 2e-2
    assert close(found, expected) and all(close(a.grad, b.grad) for a, b in zip(ours, theirs))
