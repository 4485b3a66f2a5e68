"""Stages: a program as one file of Python that a person reads, edits, runs, and hands back to the compiler."""

from .read import is_stage, load_stage, read_table
from .render import render
from .run import execute, run_stage
from .tensors import Recipe, examples, save_examples

__all__ = [
    "Recipe", "examples", "execute", "is_stage", "load_stage", "read_table", "render", "run_stage", "save_examples",
]  # fmt: skip
