"""Quantization schemes and their text form: `int8`, `int4:g64:sym:mse`, `fp8:token`, `mxfp4`, `ternary:g64`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .clipping import least_error
from .errors import UserError, nearest
from .formats import ALIASES, FORMATS, Element, Format, Grid, named
from .ops import pack_nibbles, unpack_nibbles

KERNELS = ("int8", "int4")
"""Weights that kernels read, in the layout of `fuseline::dequantize`."""


@dataclass(frozen=True)
class Scheme:
    """Quantization of a tensor whose last dimension is split in groups.

    format: a name of `formats.FORMATS`; group: channels that share a scale (0: the whole last dimension, "channel" for
    weights and "token" for activations; block formats have their own); rows: rows that share it too (0: all, "tensor");
    symmetric: without a zero point; mse: a weight's range is narrowed to what costs the least error; static:
    values of the run have one range for all calls, known before; thresholds: they have levels between thresholds that
    training places (`ops/staircase.py`).
    """

    format: str
    group: int = 0
    symmetric: bool = True
    mse: bool = False
    rows: int = 1
    static: bool = False
    thresholds: bool = False

    def __post_init__(self) -> None:
        if self.of.group and not self.group:
            object.__setattr__(self, "group", self.of.group)

    @staticmethod
    def parse(text: str, *, weights: bool) -> Scheme:
        """Reads `FORMAT[:gN|:bN|:channel|:token|:tensor][:sym|:asym][:mse|:static|:thresholds]`.

        Weights of integers of 4 bits or less are asymmetric unless `sym` is given, all else is symmetric unless `asym`
        is. `bN`, `channel` and `mse` are for weights, `token` and `static` (one range for all) for values of the run.

        Raises:
            UserError: an unknown part, or one that does not go with the format, or with weights or with activations.
        """
        word, *rest = text.split(":")
        form = named(word)
        if form is None:
            raise UserError(f"unknown number format '{word}' in '{text}'{nearest(word, (*FORMATS, *ALIASES))}")
        symmetric, mse = not (weights and form.affine and form.element.bits <= 4), False
        static, thresholds = "static" in rest, False
        whole = "channel" if weights else "token"
        group, rows = form.group, 1
        for part in rest:
            size = int(part[1:]) if part[:1] in ("g", "b") and part[1:].isdigit() else 0
            if part == "asym" and not form.affine:
                raise UserError(
                    f"'{text}': {form.name} has no zero point; integers have one, such as int{_bits(form)}:asym"
                )
            if part in ("sym", "asym"):
                symmetric = part == "sym"
            elif part == "mse" and weights:
                mse = True
            elif part == "static" and not weights:
                if form.scaling != "real":
                    raise UserError(
                        f"'{text}': {form.name} has a scale for each block of {form.group} channels, found at run time",
                        remedy=f"{form.element.name}:static, with one real scale",
                    )
                group, rows = 0, 0
            elif part == "thresholds" and not weights:
                thresholds = True
            elif form.group and part in (whole, "tensor", "g64") or form.group and size and part != f"g{form.group}":
                raise UserError(
                    f"'{text}': {form.name} has blocks of {form.group} channels",
                    remedy=f"{form.element.name}:{part}, with real scales",
                )
            elif static and (part == whole or size):
                raise UserError(
                    f"'{text}': a range that is known before the run is one for the tensor", remedy=f"{word}:static"
                )
            elif part == whole:
                group, rows = 0, 1
            elif part == "tensor":
                group, rows = 0, 0
            elif size and (part[0] == "g" or weights):
                group, rows = size, size if part[0] == "b" else 1
            else:
                own = ("b128", "mse") if weights else ("static", "thresholds")
                known = ("sym", "asym", whole, "tensor", "g64", *own)
                raise UserError(f"unknown part '{part}' in '{text}'{nearest(part, known)}")
        if not weights and rows == 0 and not symmetric and not static:
            raise UserError(
                f"'{text}': one scale for a tensor of activations has no zero point", remedy=f"{word}:tensor"
            )
        if thresholds and (not form.affine or form.element.bits > 4 or set(rest) != {"thresholds"}):
            raise UserError(f"'{text}': thresholds are learned for integers of 2 to 4 bits", remedy="int2:thresholds")
        return Scheme(form.name, group, symmetric, mse, rows, static, thresholds)

    def __str__(self) -> str:
        parts = [self.format]
        if self.static:
            parts.append("static")
        elif self.rows == 0:
            parts.append("tensor")
        elif self.rows > 1:
            parts.append(f"b{self.group}")
        elif self.group != self.of.group:
            parts.append(f"g{self.group}")
        if self.thresholds:
            parts.append("thresholds")
        elif self.of.affine:
            parts.append("sym" if self.symmetric else "asym")
        return ":".join([*parts, *(["mse"] if self.mse else [])])

    @property
    def of(self) -> Format:
        return FORMATS[self.format]

    @property
    def element(self) -> Element:
        """What codes stand for, with a zero point unless symmetric."""
        return self.of.of(self.symmetric)

    @property
    def bits(self) -> int:
        """Of a code before it is packed."""
        return self.element.bits

    def group_of(self, channels: int) -> int:
        """The group size for a last dimension of `channels`."""
        return self.group or channels

    def refuse(self, channels: int, rows: int = 0) -> str | None:
        """Why a weight [rows, channels] cannot be quantized so, or None."""
        reason = self.refuse_group(channels)
        if reason:
            return reason
        if self.rows > 1 and rows % self.rows:
            near = [n for n in range(16, rows + 1, 16) if rows % n == 0 and channels % n == 0]
            names = f" (b{', b'.join(map(str, near[-5:]))} would)" if near else ""
            return f"blocks of {self.rows} rows do not divide {rows}{names}"
        if self.format == "int4" and self.group_of(channels) % 2:
            return f"two 4-bit codes share a byte, and a group of {self.group_of(channels)} is odd"
        return None

    def refuse_group(self, channels: int) -> str | None:
        """Why a dimension of `channels` is no number of groups, or None."""
        if not self.group or channels % self.group == 0:
            return None
        near = sorted(self.fitting(channels))
        if self.of.group:
            names = f" ({', '.join(f'{self.of.element.name}:g{g}' for g in near)} would)" if near else ""
            return f"{self.format} has blocks of {self.group}, which do not divide {channels}{names}"
        names = f" ({', '.join(map(str, near))} would)" if near else ""
        return f"group size {self.group} does not divide {channels}{names}"

    def fitting(self, channels: int, count: int = 5) -> list[int]:
        """Group sizes that divide `channels`, multiples of 16, the nearest to this scheme's first."""
        dividing = [g for g in range(16, channels // 2 + 1, 16) if channels % g == 0]
        return sorted(dividing, key=lambda g: abs(g - self.group))[:count]

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Round to nearest. weight: [..., n] → the tensors named by `outputs`: codes; scale [..., n/group]; zero
        (uint8, of scale's shape) when asymmetric; outer [1], the tensor's float32 scale, where the format has one.

        Computed in float32 at least, the scale rounded to its stored type first so that codes fit what will be
        multiplied back. A scale that several rows share is repeated for each of them: kernels and gathers read rows.
        """
        groups, grid = self.grid(weight)
        scale, zero = grid.of(groups, self.narrowed(weight))
        return self.stored(weight, grid, grid.codes(groups, scale, zero), scale, zero)

    def stored(
        self, weight: torch.Tensor, grid: Grid, numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Numbers of the element, scales and zero points of the weight's groups → what `quantize` makes."""
        codes, scales = grid.element.codes(numbers), grid.scales
        parts = {"codes": self._joined(codes, weight), "scale": self._of_rows(scales.store(scale), weight)}
        if not self.symmetric:
            parts["zero"] = self._of_rows(torch.nan_to_num(zero).to(torch.uint8), weight)
        outer = getattr(scales, "outer", None)
        return parts if outer is None else parts | {"outer": outer}

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what `quantize` makes."""
        zero, outer = [] if self.symmetric else ["zero"], ["outer"] if self.of.scaling == "e4m3" else []
        return ("codes", "scale", *zero, *outer)

    def narrowed(self, weight: torch.Tensor) -> torch.Tensor | float:
        """The part of each group's range that costs the least, [..., n/group, 1]; 1 without `mse`."""
        return least_error(*self.grid(weight)) if self.mse else 1.0

    def rounded(self, weight: torch.Tensor, part: torch.Tensor | float) -> torch.Tensor:
        """The weight [..., n] as its codes stand for it, for `part` of each group's range."""
        groups, grid = self.grid(weight)
        return self._joined(grid.element.rounded(groups, *grid.of(groups, part)), weight).to(weight.dtype)

    def grid(self, weight: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        """The weight in groups, [..., n/group, group] or [rows/r, n/group, r·group], and what they are rounded to."""
        groups = weight.to(torch.promote_types(weight.dtype, torch.float32))
        channels = weight.shape[-1]
        if self.rows == 1:
            groups = groups.unflatten(-1, (-1, self.group_of(channels)))
        else:
            blocks = groups.reshape(
                -1, self.rows or weight[..., 0].numel(), channels // self.group_of(channels), self.group_of(channels)
            )
            groups = blocks.transpose(1, 2).flatten(-2)
        # float16 has too little range for scales: that of a small weight would be subnormal and lose its precision.
        stored = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
        return groups, Grid(self.element, self.of.scales(lambda: groups.abs().amax().view(1), stored))

    def _joined(self, groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Groups back in the weight's shape."""
        if self.rows == 1:
            return groups.flatten(-2)
        blocks = groups.unflatten(-1, (-1, self.group_of(weight.shape[-1])))
        return blocks.transpose(1, 2).reshape(weight.shape)

    def _of_rows(self, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """One scale a group, [..., 1], as the row's: [..., n/group]."""
        scale = scale.squeeze(-1)
        if self.rows == 1:
            return scale
        rows = weight[..., 0].numel() // scale.shape[0]
        return scale.repeat_interleave(rows, 0).reshape(*weight.shape[:-1], -1)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [..., n] as stored: of int4 and int8 for `fuseline::dequantize`, others for `fuseline::decode`."""
        if self.format == "int4":
            return pack_nibbles(codes, self.group_of(codes.shape[-1]))
        return self.element.pack(codes)

    def unpack(self, packed: torch.Tensor, n: int) -> torch.Tensor:
        """The inverse: codes [..., n]."""
        return unpack_nibbles(packed, self.group_of(n)) if self.format == "int4" else self.element.unpack(packed, n)

    def bytes_per_weight(self, channels: int, scale_bytes: int = 4) -> float:
        """Stored bytes a weight, scales and zero points included, without nvfp4's four bytes a tensor.

        scale_bytes: of a real scale, 4 (2 for bfloat16 weights).
        """
        per_group = (scale_bytes if self.of.scaling == "real" else 1) + (0 if self.symmetric else 1)
        return self.element.packed_bytes(channels) / channels + per_group / self.group_of(channels)


def _bits(form: Format) -> int:
    return min(8, max(2, form.element.bits))
