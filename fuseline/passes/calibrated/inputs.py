"""What a site multiplies its weight by, as rows; and the statistics of it that calibration needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...compiler.errors import UserError
from ..quantize_sites import Site


@dataclass
class Moments:
    """Over all rows x of all batches, for each of a convolution's groups of channels (one for other products).

    hessian: 2·Σ x·xᵀ [groups, n, n] in float64, the second derivative of the squared error of the products by a row of
    the weight; mean, largest: of |x| by channel, [groups, n]; rows: how many x there were.
    """

    hessian: torch.Tensor
    mean: torch.Tensor
    largest: torch.Tensor
    rows: int


def moments(site: Site, name: str, batches: Iterable[torch.Tensor]) -> Moments:
    """The moments of what a site reads.

    Raises:
        UserError: a value is infinite or no number; names the site and the batch.
    """
    found: Moments | None = None
    for x in finite(batches, name):
        rows = as_rows(site, x)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sizes = rows.abs()
        square = 2 * (rows.transpose(1, 2) @ rows).double()
        if found is None:
            zeros = torch.zeros_like(square[:, 0])
            found = Moments(torch.zeros_like(square), zeros, zeros.clone(), 0)
        found.hessian += square
        found.mean += sizes.sum(1, dtype=torch.float64)
        found.largest = torch.maximum(found.largest, sizes.amax(1).double())
        found.rows += rows.shape[1]
    assert found is not None
    found.mean /= max(1, found.rows)
    return found


def finite(batches: Iterable[torch.Tensor], name: str) -> Iterator[torch.Tensor]:
    """The batches of what a site reads, each looked at.

    Raises:
        UserError: a value is infinite or no number; names the site and the batch.
    """
    for number, x in enumerate(batches):
        if not bool(torch.isfinite(x).all()):
            raise UserError(
                f"calibration batch {number} makes values that are no finite numbers at {name}",
                [f"{int((~torch.isfinite(x)).sum())} of {x.numel()} that the product reads"],
                "look at the batch, or run the model in a wider dtype",
            )
        yield x


def as_rows(site: Site, x: torch.Tensor) -> torch.Tensor:
    """x as [groups, rows, n], so that the product is rows @ weightᵀ: of a convolution, the patches that it sees."""
    if site.kernel is None:
        return x.reshape(1, -1, x.shape[-1])
    kernel = site.kernel[2:]
    stride, padding, dilation, groups = _settings(site)
    x = x if x.dim() == len(kernel) + 2 else x.unsqueeze(0)
    x = F.pad(x, [edge for pair in reversed(padding) for edge in pair])
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
    rank = len(kernel)
    patches = x.unflatten(1, (groups, -1))  # batch, groups, channels, *places, *kernel
    order = (1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    return patches.permute(order).reshape(groups, -1, patches.shape[2] * math.prod(kernel))


def groups_of(site: Site) -> int:
    """How many groups of channels a site multiplies by themselves."""
    return 1 if site.kernel is None else _settings(site)[3]


def _settings(site: Site) -> tuple[list[int], list[tuple[int, int]], list[int], int]:
    """Stride, padding before and behind, and dilation, by dimension; groups."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, site.node.args, strict=False)) | dict(site.node.kwargs)
    kernel = site.kernel[2:]  # type: ignore[index]
    stride = _each(given.get("stride", 1), len(kernel))
    dilation = _each(given.get("dilation", 1), len(kernel))
    padding, groups = given.get("padding", 0), int(given.get("groups", 1))
    if padding == "same":
        whole = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        return stride, [(w // 2, w - w // 2) for w in whole], dilation, groups
    edges = _each(0 if padding == "valid" else padding, len(kernel))
    return stride, [(e, e) for e in edges], dilation, groups


def _each(given: Any, count: int) -> list[int]:
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    return [int(n) for n in (listed * count if len(listed) == 1 else listed)]
