"""One HTML page about a run of a pipeline: `record.json` in, `index.html` out. Needs no torch and no network."""

from .data import page_data, steps
from .page import render

__all__ = ["page_data", "render", "steps"]
