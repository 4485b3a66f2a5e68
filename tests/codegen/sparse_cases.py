"""Sparse linears for the template's tests: how they are built, their data, and their references in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fuseline.compiler.ops import dequantize, glu, sparse_linear
from tests.codegen.linear_cases import Format
from tests.codegen.regions import region


@dataclass(frozen=True)
class Case:
    """x [m, k] → sparse linears of `widths` columns → epilogue; weights [k, n] in `format`, groups by columns."""

    name: str
    k: int
    widths: tuple[int, ...]
    format: Format = Format()
    rank: int = 0
    each: bool = False  # a threshold for each channel
    bias: bool = False
    dense_above: int = 0
    epilogue: Callable[..., Any] = lambda *results: results if len(results) > 1 else results[0]
    extra: bool = False  # the epilogue takes a tensor of the first result's shape

    def __str__(self) -> str:
        return self.name

    def inputs(
        self, m: int, dtype: torch.dtype, seed: int, level: float = 0.7, device: str = "cpu"
    ) -> list[torch.Tensor]:
        """x, threshold, down, extra tensor, then weight, up, bias of each product. level: what |x| is compared to."""
        torch.manual_seed(seed)
        threshold = torch.full((self.k if self.each else 1,), level)
        if self.each:
            threshold = threshold * (torch.rand(self.k) + 0.5)
        found = [torch.randn(m, self.k).to(dtype), threshold]
        if self.rank:
            found.append((torch.randn(self.rank, self.k) * self.k**-0.5).to(dtype))
        if self.extra:
            found.append(torch.randn(m, self.widths[0]).to(dtype))
        for n in self.widths:
            found += self.format.tensors(self.k, n, dtype)
            if self.rank:
                found.append(torch.randn(self.rank, n).to(dtype))
            if self.bias:
                found.append(torch.randn(n).to(dtype))
        return [t.to(device) for t in found]

    def call(self, *given: torch.Tensor) -> Any:
        rest = list(given)
        x, threshold = rest.pop(0), rest.pop(0)
        down = rest.pop(0) if self.rank else None
        extras = [rest.pop(0)] if self.extra else []
        results = []
        for n in self.widths:
            stored = [rest.pop(0) for _ in range(self.format.arity)]
            up, bias = (rest.pop(0) if there else None for there in (self.rank, self.bias))
            weight = self._weight(stored, n, x.dtype)
            results.append(sparse_linear(x, weight, threshold, down, up, bias, self.dense_above))
        return self.epilogue(*results, *extras)

    def _weight(self, stored: Sequence[torch.Tensor], n: int, dtype: torch.dtype) -> torch.Tensor:
        if not self.format.bits:
            return stored[0]
        codes, scale, zero = (*stored, None)[:3]
        return dequantize(codes, scale, zero, self.format.bits, self.format.group or n, dtype)

    def graph(self, dtype: torch.dtype) -> torch.fx.GraphModule:
        dynamic = {0: (0,)} | ({3 if self.rank else 2: (0,)} if self.extra else {})
        return region(self.call, self.inputs(3, dtype, 0), dynamic)

    def exact(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """In float64; |x| is compared as it is, so that the mask is the same."""
        results = self.call(*(t.double() if t.is_floating_point() else t for t in inputs))
        return results if isinstance(results, tuple) else (results,)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return glu(gate, up, "silu")


CASES = [
    Case("float", 96, (64,)),
    Case("odd sizes", 101, (37,), each=True, bias=True),
    Case("qkv", 64, (48, 16, 16), rank=8),
    Case("gate, up", 80, (96, 96), rank=20, epilogue=gated),
    Case("down", 200, (40,), rank=5, bias=True, each=True, epilogue=lambda y, h: h + y, extra=True),
    Case("int8 channel", 96, (64,), Format(8)),
    Case("int8 g16 zero", 70, (48, 48), Format(8, 16, True), rank=4, epilogue=gated),
    Case("int4 g32", 96, (64, 32), Format(4, 32)),
    Case("int4 g48 zero", 130, (96,), Format(4, 48, True), rank=3, bias=True),
    Case("several chunks", 1100, (72,), rank=17),
    Case("int4 several chunks", 600, (128,), Format(4, 64), each=True),
    Case("dense above 2", 96, (64,), rank=4, dense_above=2),
]
