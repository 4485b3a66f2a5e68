"""What each op does to a sharded sequence, one file an op group. Importing them fills the table."""

from . import attention, contractions, indexing, losses, reductions, rowwise, views
from ._define import Rule, find

__all__ = ["Rule", "attention", "contractions", "find", "indexing", "losses", "reductions", "rowwise", "views"]
