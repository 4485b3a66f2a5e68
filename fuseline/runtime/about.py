"""What a compiled kernel is for: its ops, lines and makers, from the manifest beside the module that it came from.

A binary in the cache outlives the process and the program that led to it; this is kept with it, so that a cache hit
does not lose where a kernel comes from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KEPT = ("ops", "lines", "made_by", "regions")


def about(function: Any) -> dict[str, Any]:
    """Of a `@triton.jit` function in an emitted module; empty where no manifest lies beside it, or not that kernel."""
    try:
        path = Path(function.fn.__code__.co_filename).with_suffix(".json")
        kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
        (kernel,) = (k for k in kernels if k["name"] == function.__name__)
        return {key: kernel[key] for key in KEPT}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a description is no reason to fail
        return {}
