"""The passes of this package; importing it registers them."""

from . import recipes
from .checkpointing import Checkpoint
from .fusing import Fuse
from .losses import FuseLoss
from .merging import MergeExperts
from .quantize import Quantize
from .query_key import QueryKey
from .raising import Raise
from .rotation import Rotate
from .sequence import SequenceParallel
from .sparsity import RSparse
from .tiling import Tile

__all__ = [
    "Checkpoint", "Fuse", "FuseLoss", "MergeExperts", "Quantize", "QueryKey", "RSparse", "Raise", "Rotate",
    "SequenceParallel", "Tile", "recipes",
]  # fmt: skip
