"""The passes of this package; importing it registers them."""

from . import recipes
from .checkpointing import Checkpoint
from .fusing import Fuse
from .quantize import Quantize
from .raising import Raise
from .rotation import Rotate
from .sparsity import RSparse

__all__ = ["Checkpoint", "Fuse", "Quantize", "RSparse", "Raise", "Rotate", "recipes"]
