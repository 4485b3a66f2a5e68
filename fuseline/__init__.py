"""Fuseline: a graph compiler for PyTorch models."""

from typing import Any as _Any

from . import (
    hooks as _hooks,  # what capture does to models of other libraries
    passes as _passes,  # registers the passes of this package
)
from .artifact import load, save
from .calibrate import analyze
from .compiler.capture import capture
from .compiler.errors import FuselineError, UserError
from .compiler.framework import Level, Pass, Tier
from .compiler.observe import prove
from .compiler.pipeline import Pipeline
from .compiler.plan import Plan
from .compiler.program import Program
from .compiler.registry import register
from .compiler.rule import Rule
from .examination import examine
from .exporting import export
from .optimize import breaks, optimize, refresh, reports
from .qat import convert, prepare_qat

__version__ = "0.1.0"
__all__ = [
    "FuselineError", "Level", "Pass", "Pipeline", "Plan", "Program", "QuantizedCache", "Rule", "Tier", "UserError",
    "analyze", "breaks", "capture", "convert", "examine", "export", "load", "optimize", "prepare_qat", "prove",
    "refresh", "register", "reports", "save",
]  # fmt: skip


def __getattr__(name: str) -> _Any:
    if name == "QuantizedCache":  # imports transformers
        from .quantized_cache import QuantizedCache

        return QuantizedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
