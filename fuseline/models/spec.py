"""MODEL on the command line: which source a spec names."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch

from fuseline.compiler.errors import UserError, nearest
from fuseline.models.demo import DEMOS, load_demo
from fuseline.models.gguf import load_gguf, load_gguf_codes
from fuseline.models.huggingface import load_directory
from fuseline.models.loaded import LoadedModel
from fuseline.models.module import load_exported, load_factory

FORMS = (
    "demo:NAME",
    "hf:DIR",
    "gguf:FILE",
    "gguf-codes:FILE",
    "py:package.module:factory",
    "py:FILE.py:factory",
    "FILE.pt2",
)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load(spec: str, dtype: torch.dtype | None = None) -> LoadedModel:
    """Loads the model that `spec` names, in eval mode on the CPU.

    Args:
        spec: demo:NAME, hf:DIR, gguf:FILE, gguf-codes:FILE (linears over the file's codes), py:package.module:factory,
            py:FILE.py:factory, or the path of a .pt2 file.
        dtype: of the floating-point weights; None keeps the checkpoint's (float32 for GGUF and for demo: models).

    Raises:
        UserError: an unknown spec, a missing, truncated or corrupt file, weights that are not finite, or a package
            that the source needs and that isn't installed; each says what to do.
    """
    kind, separator, rest = spec.partition(":")
    if spec.endswith(".pt2"):
        return load_exported(Path(spec).expanduser(), spec, dtype)
    if not separator:
        raise UserError(f"{spec!r} is not a model{_suggestion(spec)}", [f"a model is one of {', '.join(FORMS)}"])
    if kind == "demo":
        return load_demo(rest, spec, dtype)
    if kind == "hf":
        return load_directory(Path(rest).expanduser(), spec, dtype)
    if kind == "gguf":
        return load_gguf(Path(rest).expanduser(), spec, dtype)
    if kind == "gguf-codes":
        return load_gguf_codes(Path(rest).expanduser(), spec, dtype)
    if kind == "py":
        return load_factory(rest, spec, dtype)
    if kind.endswith(".py"):
        raise UserError(f"{spec!r} is not a model; did you mean 'py:{spec}'?")
    raise UserError(f"unknown model source {kind!r}{nearest(kind, ['demo', 'hf', 'gguf', 'py'])}")


def parse_dtype(name: str | None) -> torch.dtype | None:
    """`"bfloat16"` → torch.bfloat16; None stays None."""
    if name is not None and name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}{nearest(name, DTYPES)}")
    return DTYPES[name] if name is not None else None


def _suggestion(spec: str) -> str:
    path = Path(spec).expanduser()
    if path.is_dir():
        return f"; did you mean 'hf:{spec}'?"
    if path.suffix == ".gguf":
        return f"; did you mean 'gguf:{spec}'?"
    if path.suffix == ".py":
        return f"; did you mean 'py:{spec}:FUNCTION'?"
    demos = [f"demo:{name}" for name in DEMOS]
    close = difflib.get_close_matches(spec, [*DEMOS, *demos], n=1, cutoff=0.5)
    return f"; did you mean 'demo:{close[0].removeprefix('demo:')}'?" if close else ""
