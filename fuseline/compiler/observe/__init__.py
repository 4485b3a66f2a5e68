"""Observers: every debugging feature is one of these, and the runner knows none of them."""

from ..verifier import Verify
from . import bisector
from .dump import Dump
from .limit import Limit
from .logged import Logged
from .numerics import Numerics
from .printing import Print
from .prove import Proof, Prove, prove
from .record import Record
from .repro import Repro
from .statistics import Statistics
from .structured import Structured
from .timing import Timing

__all__ = [
    "Dump", "Limit", "Logged", "Numerics", "Print", "Proof", "Prove", "Record", "Repro", "Statistics", "Structured",
    "Timing", "Verify", "prove",
]  # fmt: skip
