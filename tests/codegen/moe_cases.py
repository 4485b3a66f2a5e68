"""Routed experts for the template's tests: how they are built, their data, and their references in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from fuseline.compiler.formats.pair_codes import PAIR_CODES
from fuseline.compiler.formats.pairs import pack_pair
from fuseline.compiler.formats.words import Words
from fuseline.compiler.ops import decode_pair_words, decode_words, dequantize, lowrank_add, moe, moe_pairs
from fuseline.compiler.schemes import Scheme
from tests.codegen.coded_cases import laid, run_of
from tests.codegen.regions import region


@dataclass(frozen=True)
class Case:
    """hidden [T, width] → `top` of `experts` experts of a middle of `inner`.

    pairs: how many pairs of experts share their words; the others are alone; None: no words. across: both matrices are
    transposed views, as where a model stores [E, in, out]. scheme: of codes, in the layout of the kernels.
    """

    name: str
    width: int = 48
    inner: int = 32
    experts: int = 4
    top: int = 2
    pairs: int | None = None
    activation: str = "silu"
    interleaved: bool = False
    bias: bool = False
    across: bool = False
    options: tuple[float, ...] = ()
    scheme: str = ""
    ranks: tuple[int, ...] = ()
    factors: str = ""

    def __str__(self) -> str:
        return self.name

    def inputs(
        self, m: int, dtype: torch.dtype, seed: int, device: str = "cpu", indices: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """hidden, indices, weights, gate_up, down, with pairs rows and slots, then the biases."""
        make = torch.Generator(device).manual_seed(seed)
        options: Any = {"generator": make, "device": device}
        e, h, i = self.experts, self.width, self.inner
        if indices is None:
            scores = torch.rand(m, max(e, self.top), **options)
            indices = scores.topk(self.top).indices % e
        found = [torch.randn(m, h, **options).to(dtype), indices.to(device)]
        found.append(torch.rand(m, self.top, **options).to(torch.float32 if self.bias else dtype))
        shapes = (e, 2 * i, h), (e, h, i)
        if self.pairs is not None and self.scheme:
            rows, slots = self.places(device)
            slots = torch.where(slots == 2, 0, slots)
            for _, n, k in shapes:
                found += self.pair_codes(int(rows.max()) + 1, n, k, seed)
            found = [t.to(device) for t in (*found, rows, slots)]
        elif self.pairs is not None:
            rows, slots = self.places(device)
            found += [self.words(int(rows.max()) + 1, *shape[1:], options) for shape in shapes]
            found += [rows, slots]
        elif self.scheme:
            for _, n, k in shapes:
                table = torch.randn(e * n, k, generator=torch.Generator().manual_seed(seed)) * k**-0.5
                found += [t.to(device) for t in laid(table.to(dtype), self.parsed).values()]
                found += [t.to(device) for t in self.low_ranks(n, k, dtype, seed)]
        elif self.across:
            found += [(torch.randn(a, c, b, **options) * c**-0.5).to(dtype).transpose(1, 2) for a, b, c in shapes]
        else:
            found += [(torch.randn(*shape, **options) * shape[2] ** -0.5).to(dtype) for shape in shapes]
        if self.bias:
            found += [torch.randn(e, n, **options).to(dtype) for n in (2 * i, h)]
        return found

    def places(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and slots: pairs of experts that lie apart, then those alone."""
        pairs = self.pairs or 0
        rows = [e % pairs if e < 2 * pairs else e - pairs for e in range(self.experts)]
        slots = [int(e >= pairs) if e < 2 * pairs else 2 for e in range(self.experts)]
        return tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (rows, slots))  # type: ignore[return-value]

    def words(self, count: int, n: int, k: int, options: dict[str, Any]) -> torch.Tensor:
        """int16 [count, n, k]: pairs, a quarter of whose numbers a slot does not have, and bfloat16 of those alone."""
        numbers = (torch.randn(count, n, k, **options) * k**-0.5).bfloat16()
        masks = torch.rand(2, *numbers.shape, **options) < 0.75
        signs = torch.rand(2, *numbers.shape, **options) < 0.5
        packed = pack_pair(numbers.abs(), masks, signs)
        packed[self.pairs :] = numbers[self.pairs :].view(torch.int16)
        return packed

    def pair_codes(self, count: int, n: int, k: int, seed: int) -> list[torch.Tensor]:
        """Words and scales of pairs as kernels read them; a quarter of the numbers a slot does not have."""
        make, form = torch.Generator().manual_seed(seed), PAIR_CODES[self.scheme.split(":")[0]]
        codes = form.magnitudes(torch.rand(count * n, k, generator=make) * form.top)
        masks, signs = (torch.rand(2, count * n, k, generator=make) < part for part in (0.75, 0.5))
        whole = form.whole(form.pack(codes, masks, signs), k)
        words = self.pair_words(k).pack(whole)
        scale = (torch.rand(count, k // self.pair_group(k), n, generator=make) + 0.5) * k**-0.5 / form.top
        return [words, scale.bfloat16()]

    def pair_group(self, k: int) -> int:
        group = self.scheme.split(":")[1]
        return k if group == "channel" else int(group[1:])

    def pair_words(self, k: int) -> Words:
        found = Words.fitting(sum(PAIR_CODES[self.scheme.split(":")[0]].planes), k, self.pair_group(k))
        assert found is not None
        return found

    def low_ranks(self, n: int, k: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
        """Factors up and down, or codes and scale of each, and where experts' rows begin."""
        if not self.ranks:
            return []
        make, total, found = torch.Generator().manual_seed(seed + 1), sum(self.ranks), []
        for size in (n, k):
            factor = torch.randn(total, size, generator=make) * k**-0.25 * 0.5
            if self.factors:
                scale = factor.abs().amax(-1, keepdim=True) / 127
                found += [(factor / scale).round().to(torch.int8), scale.to(dtype)]
            else:
                found.append(factor.to(dtype))
        return [*found, torch.tensor((0, *accumulate(self.ranks)), dtype=torch.int32)]

    @property
    def parsed(self) -> Scheme:
        return Scheme.parse(self.scheme, weights=True)

    def expanded(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The arguments with both stacks of matrices in the place of their codes."""
        rest, found = list(given[3:]), list(given[:3])
        if self.pairs is not None:
            *words, rows, slots = rest[:6]
            form = self.scheme.split(":")[0]
            for i, k in enumerate((self.width, self.inner)):
                run, (codes, scale) = self.pair_words(k).run, words[2 * i : 2 * i + 2]
                found.append(
                    decode_pair_words(codes, scale, rows, slots, form, self.pair_group(k), run, given[0].dtype)
                )
            return found + rest[6:]
        scheme = self.parsed
        for n, k in ((2 * self.inner, self.width), (self.width, self.inner)):
            codes, scale = rest.pop(0), rest.pop(0)
            zero = None if scheme.symmetric else rest.pop(0)
            outer = rest.pop(0) if scheme.of.scaling == "e4m3" else None
            group, run = scheme.group_of(k), run_of(scheme, k, "")
            table = decode_words(codes, scale, zero, outer, scheme.format, group, run, given[0].dtype)
            base = table.view(self.experts, n, k)
            if self.ranks:
                up, down = (self.factor(rest, size, given[0].dtype) for size in (n, k))
                base = lowrank_add(base, up, down, list(self.ranks), rest.pop(0))
            found.append(base)
        return found + rest

    def factor(self, rest: list[torch.Tensor], size: int, dtype: torch.dtype) -> torch.Tensor:
        first = rest.pop(0)
        return dequantize(first, rest.pop(0), None, 8, size, dtype) if self.factors else first

    def call(self, *given: torch.Tensor) -> torch.Tensor:
        if self.scheme:
            given = tuple(self.expanded(given))
        packed = self.pairs is not None and not self.scheme
        op, count = (moe_pairs, 7) if packed else (moe, 5)
        biases = given[count:] or (None, None)
        return op(*given[:count], *biases, self.activation, self.interleaved, *self.options)  # type: ignore[no-any-return]

    def graph(self, dtype: torch.dtype) -> torch.fx.GraphModule:
        call: Callable[..., Any] = self.call
        return region(call, self.inputs(3, dtype, 0), {0: (0,), 1: (0,), 2: (0,)})

    def exact(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """In float64, on the CPU."""
        return self.call(*(t.cpu() for t in self.wide(inputs)))

    def wide(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """In float64, but for what are bytes."""
        return [t.double() if t.is_floating_point() and t.dtype.itemsize > 1 else t for t in inputs]


class Layer(torch.nn.Module):
    """A router and its experts."""

    def __init__(self, case: Case):
        super().__init__()
        _, _, _, gate_up, down = case.inputs(1, torch.float32, 0)
        self.gate_up, self.down = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)
        self.router, self.top = torch.nn.Linear(case.width, case.experts), case.top

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, indices = self.router(x).softmax(-1).topk(self.top)
        return x + moe(x, indices, weights, self.gate_up, self.down)


CASES = [
    Case("plain"),
    Case("odd sizes", width=37, inner=21, experts=5, top=3),
    Case("many experts", width=32, inner=16, experts=20, top=6),
    Case("all experts", width=64, inner=32, experts=4, top=4),
    Case("one expert", width=32, inner=48, experts=1, top=1),
    Case("gelu", activation="gelu", inner=40),
    Case("gelu_tanh", activation="gelu_tanh", interleaved=True),
    Case("relu with bias", activation="relu", bias=True, inner=24),
    Case("clamped", activation="clamped_swiglu", interleaved=True, bias=True, across=True, options=(1.702, 1.0)),
    Case("across", across=True, width=70, inner=36),
]
PAIRS = [
    Case("pairs", pairs=2),
    Case("pairs and alone", pairs=2, experts=7, top=3, width=72, inner=44),
    Case("all alone", pairs=0, experts=3),
    Case("pairs with bias", pairs=3, experts=7, bias=True, interleaved=True, activation="clamped_swiglu"),
    Case("many pairs", width=64, inner=32, experts=16, top=5, pairs=8),
]
CODED = [
    Case("int4:g32", scheme="int4:g32", width=64, inner=32),
    Case("int4:g128", scheme="int4:g128", width=128, inner=128, experts=3),
    Case("int4:g32:sym", scheme="int4:g32:sym", width=96, inner=64, interleaved=True),
    Case("int4", scheme="int4", width=100, inner=36, bias=True),
    Case("int8", scheme="int8", width=72, inner=40),
    Case("int8:g32:asym", scheme="int8:g32:asym", width=96, inner=32),
    Case("int3:g64", scheme="int3:g64", width=128, inner=64),
    Case("int2:g64", scheme="int2:g64", width=128, inner=64),
    Case("fp8", scheme="fp8", width=80, inner=48),
    Case("mxfp4", scheme="mxfp4", width=64, inner=32),
    Case("nvfp4", scheme="nvfp4", width=64, inner=48),
]
"""Codes of several formats; of one scale a row, of one a group, and of groups that are shorter than a product."""
PAIR_CODED = [
    Case("pairs in int4:g64", pairs=2, scheme="int4:g64", width=128, inner=64),
    Case("pairs in fp8:g64", pairs=2, scheme="fp8:g64", width=128, inner=64, interleaved=True),
    Case("pairs in int4:channel", pairs=2, scheme="int4:channel", experts=7, top=3, width=72, inner=44),
    Case("pairs in fp8:channel", pairs=2, scheme="fp8:channel", experts=5, width=100, inner=36, bias=True),
    Case("pairs in fp8:g128", pairs=3, scheme="fp8:g128", experts=7, width=256, inner=128),
]
LOW_RANK = [
    Case("int3:g64 with 16", scheme="int3:g64", width=128, inner=64, ranks=(16,) * 4),
    Case("int3:g64 with ranks", scheme="int3:g64", width=128, inner=64, ranks=(0, 40, 3, 17), factors="int8"),
    Case("int4 with int8", scheme="int4", width=100, inner=36, experts=3, ranks=(8, 8, 8), factors="int8", bias=True),
]
