"""Number formats by name: an element, how its scales are stored, and the group that a block format prescribes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .element import Element
from .floating import Float
from .grid import Grid
from .integer import Integer
from .midrise import MidRise
from .scales import PowerOfTwo, Real, Scales, TwoLevel, outer_scale, stretched
from .ternary import Binary, Ternary

__all__ = ["ALIASES", "FORMATS", "Element", "Float", "Format", "Integer", "Real", "Scales", "named", "stretched"]

ALIASES = {
    "fp8": "e4m3", "fp6": "e3m2", "fp4": "e2m1", "mxfp8_e4m3": "mxfp8", "mxfp6_e3m2": "mxfp6",
}  # fmt: skip
"""Other words for a format."""


@dataclass(frozen=True)
class Format:
    """group: channels that share a scale, 0 where the scheme says how many; scaling: `real`, `e8m0` or `e4m3`.

    Block formats: mxfp4, mxfp6, mxfp8 (OCP Microscaling Formats 1.0) have blocks of 32 and power-of-two scales, nvfp4
    (NVIDIA) blocks of 16, E4M3 scales and one float32 scale for the tensor.
    """

    name: str
    element: Element
    group: int = 0
    scaling: str = "real"

    def of(self, symmetric: bool) -> Element:
        """The element, with a zero point where one is asked for."""
        return self.element if symmetric or not isinstance(self.element, Integer) else Integer(self.element.bits, False)

    @property
    def affine(self) -> bool:
        """Whether it can have a zero point."""
        return isinstance(self.element, Integer)

    def scales(self, whole: Callable[[], torch.Tensor], stored: torch.dtype) -> Scales:
        """The scales of groups that together reach as far as `whole()`; real ones are kept in `stored`."""
        if self.scaling == "e8m0":
            return PowerOfTwo()
        return TwoLevel(outer_scale(whole(), self.element.top)) if self.scaling == "e4m3" else Real(stored)


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        *(Format(f"int{bits}", Integer(bits)) for bits in range(8, 1, -1)),
        *(Format(e.name, e) for e in (Float.named(f"e{x}m{y}") for x in range(1, 6) for y in range(7)) if e),
        Format("mxfp8", Float(4, 3), 32, "e8m0"), Format("mxfp8_e5m2", Float(5, 2), 32, "e8m0"),
        Format("mxfp6", Float(3, 2), 32, "e8m0"), Format("mxfp6_e2m3", Float(2, 3), 32, "e8m0"),
        Format("mxfp4", Float(2, 1), 32, "e8m0"), Format("nvfp4", Float(2, 1), 16, "e4m3"),
        *(Format(f"midrise{bits}", MidRise(bits)) for bits in range(4, 1, -1)),
        Format("ternary", Ternary()), Format("binary", Binary()),
    )
}  # fmt: skip


def named(word: str) -> Format | None:
    """The format of this name or alias."""
    return FORMATS.get(ALIASES.get(word, word))
