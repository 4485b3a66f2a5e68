"""The passes of this package; importing it registers them."""

from .fusing import Fuse
from .quantize import Quantize

__all__ = ["Fuse", "Quantize"]
