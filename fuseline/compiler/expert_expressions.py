"""Weight expressions over stacks of experts, [E, m, n]: mixtures of experts' matrices, and pairs of them in one.

Each works on few rows at a time, so that beside its result it needs little memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .expressions import GRAMMAR, Expression, Lookup, Planned
from .formats.pair_codes import PAIR_CODES
from .formats.pairs import pack_pair
from .formats.words import Words

AT_ONCE = 1 << 20
"""Elements that are worked on at a time."""

Groups = tuple[tuple[int, ...], ...]
Shares = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Mixed(Expression):
    """x [E, …] → [len(groups), …]: for each group the sum of its members times their shares, in float32 at least.

    turned: x is stored with its last two dimensions exchanged, and the result is not.
    """

    x: Expression
    groups: Groups
    shares: Shares
    turned: bool = False

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        x = values[0].transpose(1, 2) if self.turned else values[0]
        made = x.new_empty((len(self.groups), *x.shape[1:]))
        if not is_real(x):
            return made
        for out, members, shares in zip(made, self.groups, self.shares, strict=True):
            if shares == (1.0,):
                out.copy_(x[members[0]])
                continue
            for rows in pieces(out):
                wide = torch.promote_types(x.dtype, torch.float32)
                out[rows] = sum(x[e][rows].to(wide) * share for e, share in zip(members, shares, strict=True))
        return made


@dataclass(frozen=True)
class Paired(Expression):
    """x [E, m, n] with experts merged in pairs: int16 words [len(pairs), m, n] (`formats/pairs.py`) if `packed`, else
    the merged experts [E, m, n] in x's dtype.

    pairs: members of each row, one or two; tau: magnitudes that differ by less, relative to their sum, become their
    mean, others the more salient one, while the other expert has zero there; norms: float32 [E, n], what magnitudes
    are multiplied by for that. turned: x is stored with its last two dimensions exchanged, and the result is not.
    Source: PuzzleMoE (2025), section 3.
    """

    x: Expression
    pairs: Groups
    tau: float
    norms: Planned | None = None
    packed: bool = True
    turned: bool = False

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        x, *rest = values
        x = x.transpose(1, 2) if self.turned else x
        norms = rest[0] if rest else None
        if self.packed:
            made = x.new_empty((len(self.pairs), *x.shape[1:]), dtype=torch.int16)
        else:
            made = x.new_empty(x.shape)
        if not is_real(x):
            return made
        for number, members in enumerate(self.pairs):
            for rows in pieces(x[0]):
                pair = torch.stack([x[e][rows] for e in members])
                scale = None if norms is None else norms[list(members)].unsqueeze(1)
                if self.packed:
                    made[number][rows] = packed(pair, self.tau, scale)
                else:
                    for e, merged in zip(members, unpacked(pair, self.tau, scale), strict=True):
                        made[e][rows] = merged
        return made


@dataclass(frozen=True)
class PairedCodes(Expression):
    """The same in few bits: codes uint8 [len(pairs), m, bytes] and scale [len(pairs), m, n / group] in bfloat16, by
    these names (`Output`); group 0: one scale a row. Who is alone has slot 0 of its row."""

    x: Expression
    pairs: Groups
    tau: float
    format: str
    group: int = 0
    norms: Planned | None = None
    turned: bool = False

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        x, *rest = values
        x = x.transpose(1, 2) if self.turned else x
        norms, form = rest[0] if rest else None, PAIR_CODES[self.format]
        count, (_, m, n) = len(self.pairs), x.shape
        codes = x.new_empty((count, m, form.row(n)), dtype=torch.uint8)
        scales = x.new_empty((count, m, n // (self.group or n)), dtype=torch.bfloat16)
        for number, members in enumerate(self.pairs) if is_real(x) else ():
            for rows in pieces(x[0]):
                pair = torch.stack([x[e][rows] for e in members])
                scale = None if norms is None else norms[list(members)].unsqueeze(1)
                magnitude, masks = merged(pair, self.tau, scale) if len(pair) == 2 else alone(pair)
                signs = pair < 0 if len(pair) == 2 else torch.cat((pair < 0, pair < 0))
                groups = magnitude.unflatten(-1, (-1, self.group or n))
                step = (groups.amax(-1, keepdim=True) / form.top).to(torch.bfloat16)
                whole = groups / step.to(groups.dtype).clamp_min(torch.finfo(torch.bfloat16).tiny)
                found = form.magnitudes(whole.clamp(max=form.top).float()).flatten(-2)
                codes[number][rows] = form.pack(found, masks, signs)
                scales[number][rows] = step.squeeze(-1)
        return {"codes": codes, "scale": scales}


@dataclass(frozen=True)
class PairsInWords(Expression):
    """Such codes [R, m, bytes] of n pairs a row, laid out in runs of `run` words as kernels read them, the rows of all
    pairs below each other (`formats/words.py`).

    `restored` gives the packed codes back, so that nothing has to keep both.
    """

    codes: Expression
    format: str
    rows: int
    height: int
    n: int
    run: int

    @property
    def words(self) -> Words:
        return Words(sum(PAIR_CODES[self.format].planes), self.run)

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return self.words.pack(PAIR_CODES[self.format].whole(values[0], self.n).flatten(0, 1))

    def restored(self, value: torch.Tensor) -> torch.Tensor:
        whole = self.words.unpack(value, self.rows * self.height, self.n).to(torch.int16)
        return PAIR_CODES[self.format].planed(whole.view(self.rows, self.height, self.n))


def alone(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes [m, n] of one expert's rows [1, m, n], and masks [2, m, n] of a pair without a second."""
    sizes = rows[0].to(torch.promote_types(rows.dtype, torch.float32)).abs()
    has = torch.ones_like(sizes, dtype=torch.bool)
    return sizes, torch.stack((has, ~has))


def packed(pair: torch.Tensor, tau: float, norms: torch.Tensor | None) -> torch.Tensor:
    """Words int16 of one or two experts' rows [1 or 2, m, n]."""
    if len(pair) == 1:
        return pair[0].to(torch.bfloat16).view(torch.int16)
    magnitude, masks = merged(pair, tau, norms)
    return pack_pair(magnitude.to(torch.bfloat16), masks, pair < 0)


def unpacked(pair: torch.Tensor, tau: float, norms: torch.Tensor | None) -> torch.Tensor:
    """The same as the experts that the words stand for, in the rows' dtype and without the words' rounding."""
    if len(pair) == 1:
        return pair
    magnitude, masks = merged(pair, tau, norms)
    return (magnitude * masks * torch.where(pair < 0, -1, 1)).to(pair.dtype)


def merged(pair: torch.Tensor, tau: float, norms: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The magnitudes [m, n] that two experts' rows [2, m, n] share, and which of them has each, bool [2, m, n]."""
    sizes = pair.to(torch.promote_types(pair.dtype, torch.float32)).abs()
    salient = sizes if norms is None else sizes * norms
    first = salient[0] >= salient[1]
    similar = (sizes[0] - sizes[1]).abs() <= tau * (sizes[0] + sizes[1])
    chosen = torch.where(first, sizes[0], sizes[1])
    return torch.where(similar, (sizes[0] + sizes[1]) / 2, chosen), torch.stack((first | similar, ~first | similar))


def pieces(matrix: torch.Tensor) -> list[slice]:
    """Slices of rows with few elements each."""
    step = max(1, AT_ONCE // max(1, matrix[0].numel()))
    return [slice(a, a + step) for a in range(0, matrix.shape[0], step)]


def is_real(x: torch.Tensor) -> bool:
    """Whether a tensor has values."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type != "meta"


GRAMMAR.update({kind.__name__.lower(): kind for kind in (Mixed, Paired, PairedCodes, PairsInWords)})
