"""Linear regions for the template's tests: how they are built, their data, and their references in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from fuseline.compiler.ops import dequantize, glu, layer_norm, pack_nibbles, rms_norm
from tests.codegen.regions import region

Weight = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def quantized(n: int, k: int, bits: int, group: int, zero: bool, scale_dtype: torch.dtype = torch.float32) -> Weight:
    """Random codes, scales and zero points of an [n, k] weight."""
    scale = (torch.rand(n, k // group) * 0.02 + 0.01).to(scale_dtype)
    if bits == 4:
        codes = pack_nibbles(torch.randint(0, 16, (n, k), dtype=torch.uint8), group)
        return codes, scale, torch.randint(0, 16, (n, k // group), dtype=torch.uint8) if zero else None
    if zero:
        return (
            torch.randint(0, 256, (n, k), dtype=torch.uint8),
            scale / 16,
            torch.randint(0, 256, (n, k // group), dtype=torch.uint8),
        )
    return torch.randint(-127, 128, (n, k), dtype=torch.int8), scale / 16, None


@dataclass(frozen=True)
class Format:
    """bits 0: float weights; group 0: one scale a channel."""

    bits: int = 0
    group: int = 0
    zero: bool = False

    def tensors(self, n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
        if not self.bits:
            return [(torch.randn(n, k) * k**-0.5).to(dtype)]
        return [t for t in quantized(n, k, self.bits, self.group or k, self.zero) if t is not None]

    def weight(self, tensors: Sequence[torch.Tensor], k: int, dtype: torch.dtype) -> torch.Tensor:
        if not self.bits:
            return tensors[0]
        codes, scale, zero = (*tensors, None)[:3]
        return dequantize(codes, scale, zero, self.bits, self.group or k, dtype)

    @property
    def arity(self) -> int:
        return (3 if self.zero else 2) if self.bits else 1


@dataclass(frozen=True)
class Case:
    """One region: x [m, k] → norm → linears of `widths` columns → epilogue.

    norm: None or a function (x, norm parameters) with `norm_parameters` vectors of k; epilogue: a function of the
    linears' results and the extra tensors, of shapes that `extras` gives for m rows.
    """

    name: str
    k: int
    widths: tuple[int, ...]
    formats: tuple[Format, ...] = (Format(),)
    norm: Callable[..., torch.Tensor] | None = None
    norm_parameters: int = 0
    bias: bool = False
    epilogue: Callable[..., Any] = lambda *results: results if len(results) > 1 else results[0]
    extras: Callable[[int], list[tuple[int, ...]]] = field(default=lambda m: [])

    def __str__(self) -> str:
        return self.name

    def format(self, i: int) -> Format:
        return self.formats[i % len(self.formats)]

    def inputs(self, m: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        tensors = [torch.randn(m, self.k).to(dtype) + 0.25]
        tensors += [(torch.rand(self.k) + 0.5).to(dtype) for _ in range(self.norm_parameters)]
        for i, n in enumerate(self.widths):
            tensors += self.format(i).tensors(n, self.k, dtype)
            tensors += [torch.randn(n).to(dtype)] if self.bias else []
        return tensors + [torch.randn(*shape).to(dtype) for shape in self.extras(m)]

    def function(self, dtype: torch.dtype) -> Callable[..., Any]:
        """The region in eager; `dtype` is the one that weights are dequantized to."""

        def run(x: torch.Tensor, *tensors: torch.Tensor) -> Any:
            rest = list(tensors)
            parameters = [rest.pop(0) for _ in range(self.norm_parameters)]
            h = x if self.norm is None else self.norm(x, *parameters)
            results = []
            for i in range(len(self.widths)):
                form = self.format(i)
                w = form.weight([rest.pop(0) for _ in range(form.arity)], self.k, dtype)
                results.append(F.linear(h, w, rest.pop(0) if self.bias else None))
            return self.epilogue(*results, *rest)

        return run

    def graph(self, m: int, dtype: torch.dtype) -> GraphModule:
        """The region with a symbolic number of rows."""
        tensors = self.inputs(m, dtype)
        extras = self.extras(m)
        first = len(tensors) - len(extras)
        rowed = [0, *(first + i for i, shape in enumerate(extras) if len(shape) == 2)]
        return region(self.function(dtype), tensors, dict.fromkeys(rowed, (0,)))

    def exact(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the region means: everything in float64, from the given inputs."""
        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        result = self.function(torch.float64)(*wide)
        return result if isinstance(result, tuple) else (result,)


def rms(**options: Any) -> Callable[..., torch.Tensor]:
    return lambda x, w=None: rms_norm(x, w, 1e-5, **options)


def layer(x: torch.Tensor, w: torch.Tensor | None = None, b: torch.Tensor | None = None) -> torch.Tensor:
    return layer_norm(x, w, b, 1e-5)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return glu(gate, up, "silu")


def residual(y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return r + y


def everything(gate: torch.Tensor, up: torch.Tensor, r: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> Any:
    """GELU gate, residual, a column vector, a number for each row; two outputs of one section."""
    y = glu(gate, up, "gelu_tanh") * s + r * 0.5
    return y * t, F.silu(up)


CASES = [
    Case("float", 576, (192,)),
    Case("float odd sizes", 577, (37,), bias=True),
    Case("float tiny", 3, (1,)),
    Case("int4 g64", 576, (192,), (Format(4, 64),)),
    Case("int4 g32 zero", 576, (65,), (Format(4, 32, True),), bias=True),
    Case("int4 g96 zero", 576, (33,), (Format(4, 96, True),)),
    Case("int4 g144", 576, (33,), (Format(4, 144),)),
    Case("int4 g192", 576, (33,), (Format(4, 192),)),
    Case("int4 g18", 36, (33,), (Format(4, 18, True),)),
    Case("int4 channel", 576, (33,), (Format(4),)),
    Case("int4 channel zero, odd half", 34, (33,), (Format(4, 0, True),)),
    Case("int8 channel", 1536, (48,), (Format(8),)),
    Case("int8 channel zero", 100, (33,), (Format(8, 0, True),)),
    Case("int8 g128", 384, (33,), (Format(8, 128),)),
    Case("int8 g72 zero", 144, (33,), (Format(8, 72, True),)),
    Case("rms float", 576, (64,), norm=rms(accumulate=torch.float32), norm_parameters=1),
    Case("rms offset int4", 192, (40,), (Format(4, 64),), norm=rms(unit_offset=True), norm_parameters=1),
    Case("rms cast last", 100, (33,), (Format(8),), rms(accumulate=torch.float32, cast_first=False), 1),
    Case("rms no weight", 96, (33,), (Format(4, 96, True),), rms()),
    Case("layer float", 100, (33,), norm=layer, norm_parameters=2, bias=True),
    Case("layer int4", 576, (33,), (Format(4, 64, True),), layer, 2),
    Case("layer no weight int4", 96, (33,), (Format(4, 96),), layer),
    Case("layer no weight int8", 80, (33,), (Format(8),), layer),
    Case("glu int4", 192, (96, 96), (Format(4, 64, True),), rms(accumulate=torch.float32), 1, epilogue=gated),
    Case("glu mixed formats", 64, (40, 40), (Format(8), Format(4, 32)), rms(), 1, epilogue=gated),
    Case("residual", 256, (48,), (Format(4, 128),), epilogue=residual, extras=lambda m: [(m, 48)]),
    Case("qkv", 192, (80, 33, 33), (Format(4, 64),), rms(accumulate=torch.float32), 1, bias=True),
    Case("qkv mixed formats", 64, (33, 16, 7), (Format(), Format(8), Format(4, 32, True)), layer, 2),
    Case(
        "everything", 64, (24, 24), (Format(8, 64),), rms(), 1, bias=True, epilogue=everything,
        extras=lambda m: [(m, 24), (24,), (m, 1)],
    ),
]  # fmt: skip
