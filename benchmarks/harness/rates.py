"""What the device reaches at most, measured in the same run: the floors that rows are held to."""

from __future__ import annotations

import torch

from .timing import Timing, graph_replays

REPLAYS = 5


def device_rates(device: torch.device) -> dict[str, float]:
    """Bytes a second of a device copy (read and written) and of a read, FLOP a second of a bfloat16 product.

    bandwidth is the larger of the first two: what a floor in bytes is divided by. On a CPU the operands are small and
    the product is float32.
    """
    on_gpu = device.type == "cuda"
    size = (1 << 30) if on_gpu else (1 << 24)  # bytes, beyond what a cache holds
    n, dtype = (8192, torch.bfloat16) if on_gpu else (256, torch.float32)
    copy, read = 2 * size / copying(size, device).median, size / reading(size, device).median
    flops = 2 * n**3 / multiplying(n, dtype, device).median
    if on_gpu:
        torch.cuda.empty_cache()
    return {"copy_bytes_s": copy, "read_bytes_s": read, "bandwidth": max(copy, read), "matmul_flop_s": flops}


def copying(size: int, device: torch.device) -> Timing:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return graph_replays(lambda i: target.copy_(source), 4, device, REPLAYS)


def reading(size: int, device: torch.device) -> Timing:
    source, total = torch.ones(size // 4, device=device), torch.empty((), device=device)
    return graph_replays(lambda i: torch.sum(source, 0, out=total), 4, device, REPLAYS)


def multiplying(n: int, dtype: torch.dtype, device: torch.device) -> Timing:
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    return graph_replays(lambda i: torch.mm(a, b, out=product), 4, device, REPLAYS)
