"""The passes of this package; importing it registers them."""

from . import recipes
from .fusing import Fuse
from .quantize import Quantize
from .raising import Raise
from .rotation import Rotate

__all__ = ["Fuse", "Quantize", "Raise", "Rotate", "recipes"]
