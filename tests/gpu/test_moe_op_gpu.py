"""The naive twin of `fuseline::moe` on a GPU: its grouped products, none of which waits for the device."""

from __future__ import annotations

import pytest
import torch

from fuseline.compiler import ops

pytestmark = pytest.mark.gpu


def layer(tokens: int, experts: int, chosen: int, hidden: int, inner: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)
    indices = torch.stack([torch.randperm(experts, generator=draw)[:chosen] for _ in range(tokens)])
    weights = torch.rand(tokens, chosen, generator=draw, dtype=torch.float64)
    gate_up, down = rand(experts, 2 * inner, hidden) / hidden**0.5, rand(experts, hidden, inner) / inner**0.5
    parts = [rand(tokens, hidden), indices, weights, gate_up, down]
    return [p if p.dtype == torch.int64 else p.to(dtype) for p in parts]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double().cpu() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 8, 2), (16, 64, 8), (300, 8, 2)])
def test_forward_and_backward(
    tokens: int, experts: int, chosen: int, dtype: torch.dtype, bound: float, turned: bool
) -> None:
    parts = layer(tokens, experts, chosen, 64, 48, dtype)
    on_gpu = [p.cuda() for p in parts]
    if turned:
        on_gpu[3:] = [p.transpose(1, 2).contiguous().transpose(1, 2) for p in on_gpu[3:]]
    results = []
    for own in ([p.double() if p.is_floating_point() else p for p in parts], on_gpu):
        leaves = [p.detach().requires_grad_() if p.is_floating_point() else p for p in own]
        out = ops.moe(*leaves)
        wanted = [p for p in leaves if p.requires_grad]
        results.append([out, *torch.autograd.grad(out.double().square().sum(), wanted)])
    for found, expected in zip(results[1], results[0], strict=True):
        assert error(found.detach(), expected.detach()) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 64])
def test_it_is_captured_in_a_cuda_graph(tokens: int, dtype: torch.dtype) -> None:
    parts = [p.cuda() for p in layer(tokens, 16, 4, 64, 32, dtype)]
    expected = ops.moe(*parts)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.moe(*parts)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.moe(*parts)
    parts[1].copy_(parts[1].flip(0))
    graph.replay()
    assert torch.equal(out, ops.moe(*parts))
    assert expected.shape == out.shape
