"""Random regions of pointwise and row ops on random shapes, strides and dtypes, against eager in float64."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.codegen.regions import check

Op = Callable[..., torch.Tensor]

# Each keeps values of order one, so that errors can be told from rounding.
UNARY: list[Op] = [
    torch.tanh, torch.sigmoid, torch.sin, lambda x: x * 0.5 + 0.25, lambda x: x.clamp(-1, 1), torch.relu,
    lambda x: x / (x.abs() + 1), lambda x: torch.rsqrt(x * x + 1), lambda x: torch.where(x > 0, x, 0.1 * x),
]  # fmt: skip
BINARY: list[Op] = [
    torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda a, b: torch.where(a < b, a, b + 0.1),
]  # fmt: skip
ROW: list[Op] = [
    lambda x: torch.softmax(x, -1), lambda x: x - x.mean(-1, keepdim=True),
    lambda x: x.sum(-1, keepdim=True) / x.shape[-1],
    lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 0.1), lambda x: x.amax(-1, keepdim=True) + x,
]  # fmt: skip
MOVE: list[Op] = [
    lambda x: x.transpose(0, 1), lambda x: x.unsqueeze(1).expand(-1, 2, *[-1] * (x.dim() - 1))[:, 0],
    lambda x: torch.cat((x[..., 1:], x[..., :1]), -1), lambda x: x.flatten(0, 1).unflatten(0, x.shape[:2]),
]  # fmt: skip


def program(seed: int, moves: bool) -> Op:
    """A random straight-line program on two [a, b, n] tensors and an [n] one; what it does depends on the seed alone.

    Rows stay rows: dimensions are swapped back before the next op, so that any result broadcasts with any other.
    """

    def run(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pick = random.Random(seed)
        values = [x, y, w]
        for _ in range(pick.randint(2, 7)):
            a, b = pick.choice(values), pick.choice(values)
            kind = pick.choice(("unary", "binary", "binary", "row", "move" if moves else "unary"))
            if kind == "unary":
                values.append(pick.choice(UNARY)(a))
            elif kind == "binary":
                values.append(pick.choice(BINARY)(a, b))
            elif kind == "row":
                values.append(pick.choice(ROW)(a + x))
            else:
                move = pick.choice(MOVE)
                moved = move(a + x)
                values.append(moved if moved.shape == x.shape else moved.transpose(0, 1) * 1)
        return tuple(value + x for value in values[-2:])

    return run


def check_region(
    seed: int, shape: tuple[int, int, int], dtype: torch.dtype, layout: str, symbolic: bool, moves: bool
) -> None:
    a, b, n = shape
    x = torch.randn(a, b, n, dtype=dtype)
    y = {
        "contiguous": torch.randn(a, b, n, dtype=dtype),
        "transposed": torch.randn(b, a, n, dtype=dtype).transpose(0, 1),
        "expanded": torch.randn(b, 1, dtype=dtype).expand(a, b, n),
    }[layout]
    dynamic = {0: (0, 1), 1: (0, 1)} if symbolic and layout != "expanded" else {}
    w, bound = torch.randn(n, dtype=dtype), 1e-4 if dtype == torch.float32 else 1e-11
    with tempfile.TemporaryDirectory() as folder:
        # values are of order one, so a result that cancels to zero is measured against that
        check(program(seed, moves), x, y, w, folder=Path(folder), dynamic=dynamic, bound=bound, least=1.0)


regions = given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(2, 5), st.integers(2, 5), st.sampled_from((1, 2, 7, 16, 33, 130))),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    layout=st.sampled_from(("contiguous", "transposed", "expanded")),
    symbolic=st.booleans(),
    moves=st.booleans(),
)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False)
@regions
def test_random_regions(
    seed: int, shape: tuple[int, int, int], dtype: torch.dtype, layout: str, symbolic: bool, moves: bool
) -> None:
    check_region(seed, shape, dtype, layout, symbolic, moves)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False)
@regions
def test_more_random_regions(
    seed: int, shape: tuple[int, int, int], dtype: torch.dtype, layout: str, symbolic: bool, moves: bool
) -> None:
    check_region(seed, shape, dtype, layout, symbolic, moves)
