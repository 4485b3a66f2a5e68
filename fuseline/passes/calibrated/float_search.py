"""Which ExMy, and where it ends, for a product y = x·Wᵀ: a search by the error of y.

    weights      x̂ ≈ x given: for each format of as many bits, ŵ of each row (or group) for each end of its range,
                 ranked by Σⱼ E[x̂ⱼ²]·(wⱼ − ŵⱼ)²; of the best few, that with the least ‖x·w − x̂·ŵ‖² is the row's
    activations  the same for one end of all of x, ranked by Σⱼ ‖Wⱼ‖²·(xⱼ − x̂ⱼ)², by the whole error of the best few

where an end is part·max|·|, a real exponent bias b₀ − log₂ part, with part from 2^0.35 to 2^−1.5 in steps of 2^1/16.
Channels of x are brought near the largest by powers of two first, 2^kⱼ with k from 0 to 2^E − 1, and the columns of W
divided by the same: an exponent bias of each channel, which costs nothing where the product is.

Source: LLM-FP4 (Liu et al., 2023), sections 3 and 4, pre-shifted exponent bias included. There biases are multiples of
b₀, which is a search for nothing where b₀ is near 0, and the search goes round three times; here activations are chosen
for W as it is, then weights for x as it is rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...compiler.formats import FORMATS, Float
from ...compiler.schemes import Scheme

FIRST, LAST, STEP = 0.35, -1.5, 1 / 16
FEW = 4
"""Ends that are compared by the whole error."""
ROWS = 96
"""Rows of a weight that formats are compared on."""


@dataclass(frozen=True)
class Input:
    """rounded: what the product reads in x's place, [rows, n]; scheme, scale [1], shift [n]: how it is made."""

    rounded: torch.Tensor
    scheme: Scheme | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None


def choices(scheme: Scheme, among: Sequence[str]) -> list[Scheme]:
    """The scheme in every floating-point format of as many bits, or in those of `among`; its own first."""
    bits = scheme.element.bits
    given = [Scheme.parse(text, weights=True) for text in among]
    named = [one.format for one in given if one.element.bits == bits and isinstance(one.element, Float)]
    alike = [n for n, form in FORMATS.items() if n == form.element.name and n[0] == "e" and form.element.bits == bits]
    if scheme.of.scaling != "real":
        return [scheme]  # a block format is its element
    return [replace(scheme, format=name) for name in dict.fromkeys(named or [scheme.format, *alike])]


def ends() -> list[float]:
    """The parts of a range that are tried, the whole one first."""
    count = int((FIRST - LAST) / STEP)
    return [1.0, *(2.0 ** (FIRST - STEP * i) for i in range(count + 1))]


def nearest_input(x: torch.Tensor, scheme: Scheme) -> Input:
    """One scale for the largest of x."""
    groups = x.reshape(1, -1)
    _, grid = scheme.grid(groups)
    scale, zero = grid.of(groups)
    return Input(grid.element.rounded(groups, scale, zero).view_as(x))


def choose_input(x: torch.Tensor, weight: torch.Tensor, scheme: Scheme, among: Sequence[str]) -> Input:
    """The best format, end and shifts for x [rows, n], which weight [out, n] multiplies."""
    product = weight.to(x)
    sizes, gram = product.square().sum(0), product.t() @ product
    best: tuple[float, Input] | None = None
    for tried in choices(scheme, among):
        shift = shifts(x.abs().amax(0), 2**tried.element.exponent - 1)  # type: ignore[attr-defined]
        made = functools.partial(_input, x, shift, tried)
        ranked = sorted(ends(), key=lambda part, made=made: float(((x - made(part).rounded) ** 2 * sizes).sum()))  # type: ignore[misc]
        for candidate in map(made, ranked[:FEW]):
            lost = x - candidate.rounded
            error = float(((lost @ gram) * lost).sum())
            if best is None or error < best[0]:
                best = (error, candidate)
    assert best is not None
    return best[1]


def _input(x: torch.Tensor, shift: torch.Tensor, scheme: Scheme, part: float) -> Input:
    groups = (x * shift).reshape(1, -1)
    _, grid = scheme.grid(groups)
    scale, zero = grid.of(groups, part)
    rounded = grid.element.rounded(groups, scale, zero).view_as(x) / shift
    return Input(rounded, scheme, scale.reshape(1).float(), shift)


def shifts(largest: torch.Tensor, most: int) -> torch.Tensor:
    """2^kⱼ [n] that brings each channel's largest value near the largest of all; 1 for a channel of zeros."""
    alive = largest > 0
    power = torch.log2(largest.max() / torch.where(alive, largest, largest.max())).round().clamp(0, most)
    return torch.where(alive, torch.exp2(power), torch.ones_like(power))


def choose_weight(
    weight: torch.Tensor, x: torch.Tensor, rounded: torch.Tensor, scheme: Scheme, among: Sequence[str]
) -> tuple[Scheme, torch.Tensor, float]:
    """The best format, the part of each group's range [..., 1], and Σ‖x·w − x̂·ŵ‖², for weight [out, n].

    x, rounded: [rows, n], with the channels multiplied by the shifts that weight's columns are divided by.
    """
    target = moments_of(x, rounded)
    tried = choices(scheme, among)
    if len(tried) > 1 and scheme.rows == 1:
        some = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight)), device=weight.device).long()
        errors = [float(_fit(weight[some], target, s)[1].sum()) for s in tried]
        tried = [tried[min(range(len(tried)), key=errors.__getitem__)]]
    part, error = _fit(weight, target, tried[0])
    return tried[0], part, float(error.sum())


@dataclass(frozen=True)
class Target:
    """What is aimed at, x·Wᵀ, and what is read, x̂: their second moments."""

    both: torch.Tensor  # x̂ᵀx̂
    cross: torch.Tensor  # x̂ᵀx
    plain: torch.Tensor  # xᵀx

    def errors(self, weight: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        """‖x·w − x̂·ŵ‖² by row, for w and ŵ [rows, n]."""
        size = ((weight @ self.plain) * weight).sum(-1)
        return (size - 2 * ((back @ self.cross) * weight).sum(-1) + ((back @ self.both) * back).sum(-1)).clamp(min=0)


def moments_of(x: torch.Tensor, rounded: torch.Tensor) -> Target:
    """For x and x̂, [samples, n]; in float64: an error is a small difference of large sums."""
    x, rounded = x.double(), rounded.double()
    return Target(rounded.t() @ rounded, rounded.t() @ x, x.t() @ x)


def to_nearest(weight: torch.Tensor, x: torch.Tensor, rounded: torch.Tensor, scheme: Scheme) -> float:
    """Σ‖x·w − x̂·ŵ‖² with ŵ to nearest."""
    back = scheme.rounded(weight, 1.0)
    return float((x.double() @ weight.t().double() - rounded.double() @ back.t().double()).square().sum())


def _fit(weight: torch.Tensor, target: Target, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of each group's range [..., 1] and each row's error."""
    groups, grid = scheme.grid(weight)
    wide = weight.to(groups.dtype)
    importance = target.both.diagonal().to(groups.dtype).expand_as(wide)
    heavy = scheme.grid(importance)[0]
    tried = torch.tensor(ends(), dtype=groups.dtype, device=groups.device)
    costs = []
    for part in tried:
        lost = grid.element.rounded(groups, *grid.of(groups, part)) - groups
        costs.append((lost.square_() * heavy).sum(-1, keepdim=True))
    order = tried[torch.stack(costs).argsort(0)[:FEW]]
    whole = torch.ones_like(order[:1])
    best = torch.full((len(wide),), torch.inf, dtype=groups.dtype, device=groups.device)
    kept = whole[0]
    for part in torch.cat((whole, order)):
        error = target.errors(wide.double(), scheme.rounded(weight, part).double()).to(groups.dtype)
        better = error < best if scheme.rows == 1 else (error.sum() < best.sum()).expand_as(error)
        best = torch.where(better, error, best)
        chosen = better.view(-1, *[1] * (kept.dim() - 1)) if scheme.rows == 1 else better[0]
        kept = torch.where(chosen, part, kept)  # rows that share a scale choose together
    return kept, best
