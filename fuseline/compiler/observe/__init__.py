"""Observers: every debugging feature is one of these, and the runner knows none of them."""

from ..verifier import Verify
from .dump import Dump
from .numerics import Numerics
from .statistics import Statistics
from .timing import Timing

__all__ = ["Dump", "Numerics", "Statistics", "Timing", "Verify"]
