"""Linears with coded weights for the template's tests: every format, and what stands around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from fuseline.compiler.formats.words import Words, as_bits
from fuseline.compiler.ops import decode, decode_words, encode, glu, layer_norm, quantize, rms_norm
from fuseline.compiler.schemes import Scheme
from tests.codegen.regions import region


@dataclass(frozen=True)
class Coded:
    """One region: x [m, k] → norm → linears of `widths` columns of a scheme's weights → epilogue.

    activations: "int8" or "e4m3" codes in the place of x, multiplied as they are.
    """

    scheme: str
    k: int
    widths: tuple[int, ...] = (33,)
    around: str = ""
    activations: str = ""

    def __str__(self) -> str:
        name = " ".join(filter(None, [self.scheme, f"{self.k}", self.around, self.activations]))
        return name if len(self.widths) == 1 else f"{name} x{len(self.widths)}"

    @property
    def parsed(self) -> Scheme:
        return Scheme.parse(self.scheme, weights=True)

    def weight(self, n: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """A random weight as the kernel reads it."""
        return laid((torch.randn(n, self.k) * self.k**-0.5).to(dtype), self.parsed, self.activations)

    def inputs(self, m: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        x = torch.randn(m, self.k).to(dtype) + 0.25
        if self.activations == "int8":
            tensors = list(quantize(x, 8, self.k))
        elif self.activations:
            tensors = list(encode(x, self.activations, self.k))
        else:
            tensors = [x]
        if self.around in ("rms", "glu", "layer"):
            tensors += [(torch.rand(self.k) + 0.5).to(dtype) for _ in range(2 if self.around == "layer" else 1)]
        for n in self.widths:
            tensors += self.weight(n, dtype).values()
        if self.around == "residual":
            tensors += [torch.randn(self.widths[0]).to(dtype), torch.randn(m, self.widths[0]).to(dtype)]
        return tensors

    def function(self, dtype: torch.dtype) -> Callable[..., Any]:
        """The region in eager; `dtype` is the one that codes are decoded to."""

        def run(x: torch.Tensor, *tensors: torch.Tensor) -> Any:
            rest = list(tensors)
            if self.activations:
                x = decode(x, rest.pop(0), None, None, self.activations, self.k, False, dtype)
            if self.around in ("rms", "glu"):
                x = rms_norm(x, rest.pop(0), 1e-5)
            elif self.around == "layer":
                x = layer_norm(x, rest.pop(0), rest.pop(0), 1e-5)
            results = [F.linear(x, self.decoded(rest, dtype)) for _ in self.widths]
            if self.around == "glu":
                return glu(results[0], results[1], "silu")
            if self.around == "residual":
                return rest[1] + (results[0] + rest[0])
            return tuple(results) if len(results) > 1 else results[0]

        return run

    def decoded(self, rest: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        scheme = self.parsed
        codes, scale = rest.pop(0), rest.pop(0)
        zero = None if scheme.symmetric else rest.pop(0)
        outer = rest.pop(0) if scheme.of.scaling == "e4m3" else None
        group = scheme.group_of(self.k)
        return decode_words(
            codes, scale, zero, outer, scheme.format, group, run_of(scheme, self.k, self.activations), dtype
        )

    def graph(self, m: int, dtype: torch.dtype) -> GraphModule:
        """The region with a symbolic number of rows."""
        tensors = self.inputs(m, dtype)
        rowed = [0] + ([1] if self.activations else []) + ([len(tensors) - 1] if self.around == "residual" else [])
        return region(self.function(dtype), tensors, dict.fromkeys(rowed, (0,)))

    def exact(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the region means: the codes' numbers, and everything in float64."""
        kept = (torch.float8_e4m3fn, torch.float8_e5m2)
        wide = [t.double() if t.is_floating_point() and t.dtype not in kept else t for t in inputs]
        result = self.function(torch.float64)(*wide)
        return result if isinstance(result, tuple) else (result,)


def run_of(scheme: Scheme, k: int, activations: str) -> int:
    """The run of a scheme's words, 0 for bytes."""
    words = None if scheme.bits == 8 and activations else Words.fitting(scheme.bits, k, scheme.group_of(k))
    return words.run if words else 0


def laid(weight: torch.Tensor, scheme: Scheme, activations: str = "") -> dict[str, torch.Tensor]:
    """What `scheme` makes of a weight, in the kernel's layout."""
    parts, run = scheme.quantize(weight), run_of(scheme, weight.shape[-1], activations)
    if run:
        parts["codes"] = Words(scheme.bits, run).pack(as_bits(parts["codes"]))
    return parts | {name: parts[name].t().contiguous() for name in ("scale", "zero") if name in parts}


CASES = [
    Coded("int4:g128", 256),
    Coded("int4:g64:sym", 576, (65,), "residual"),
    Coded("int4:g32", 96, (40,), "rms"),
    Coded("int4:g16:sym", 64),
    Coded("int4", 100),
    Coded("int4:sym", 256, (64, 33, 7), "layer"),
    Coded("int2:g64", 256, (33, 33), "glu"),
    Coded("int2:sym", 264),
    Coded("int3:g64", 512),
    Coded("int3:g128:sym", 1024, (16, 48), "rms"),
    Coded("int3", 300),
    Coded("int5:g64:asym", 256), Coded("int6:g32", 96), Coded("int7:g64:asym", 256),
    Coded("int8", 300, (33,), "residual"), Coded("int8:asym", 256), Coded("int8:g64", 256), Coded("int8:g32:asym", 96),
    Coded("ternary:g64", 256), Coded("ternary", 200, (33,), "residual"),
    Coded("binary:g128", 512), Coded("binary", 256, (16, 24), "rms"),
    Coded("fp8", 256, (33,), "rms"), Coded("fp8:g64", 256), Coded("e5m2", 160),
    Coded("fp4:g32", 96), Coded("fp4", 576), Coded("fp6:g64", 256), Coded("e2m3", 256), Coded("e5m1:g64", 256),
    Coded("e1m2:g64", 128), Coded("e4m0", 512),
    Coded("mxfp4", 256, (33, 33), "glu"), Coded("mxfp8", 128), Coded("mxfp6", 256), Coded("nvfp4", 128, (33,), "rms"),
]  # fmt: skip
"""Codes × values of the run."""

WITH_CODES = [
    Coded("int8", 300, (33,), "residual", "int8"),
    Coded("int8", 256, (33, 33), "", "int8"),
    Coded("int8:g64", 256, (33,), "", "int8"),
    Coded("int4:g128:sym", 256, (65,), "", "int8"),
    Coded("int4:g64", 576, (33,), "", "int8"),
    Coded("int4:sym", 200, (33,), "residual", "int8"),
    Coded("int4", 256, (16,), "", "int8"),
    Coded("int3:g64:sym", 512, (33,), "", "int8"),
    Coded("int2:g64:sym", 256, (33,), "", "int8"),
    Coded("ternary", 256, (33,), "", "int8"),
    Coded("ternary:g64", 256, (33,), "", "int8"),
    Coded("binary", 512, (33,), "", "int8"),
    Coded("fp8", 300, (33,), "residual", "e4m3"),
    Coded("fp8", 256, (33, 16), "", "e4m3"),
]
"""Codes × codes."""
