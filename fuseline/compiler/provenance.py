"""Where a node comes from: the user's line, the module path, and the passes and rules that made it.

The chain of makers lives under `meta["custom"]["fuseline"]`: of all metadata only a few keys survive retracing and
AOTAutograd, and `custom` is one of them.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.fx import Node

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')
_HERE = [Path(torch.__file__).parent, Path(__file__).parent.parent]
_OURS = tuple(f"{path}{os.sep}" for folder in _HERE for path in dict.fromkeys((folder, folder.resolve())))
_MODELS = tuple(f"{folder}models{os.sep}" for folder in _OURS)
_STANDARD = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = tuple(f"{sysconfig.get_path(kind)}{os.sep}" for kind in ("purelib", "platlib"))
_INDEX = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\[(?:'([^']+)'|(\d+))\]")
KEPT = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "seq_nr", "autocast")


def is_ours(file: str) -> bool:
    """Whether a file belongs to PyTorch or to this package: judged by where they lie, since a user's folder may be
    called `torch` or `fuseline` too. The models that this package brings along are a model's code."""
    return file.startswith(_OURS) and not file.startswith(_MODELS)


def is_pythons(file: str) -> bool:
    """Whether a file belongs to Python's standard library."""
    return file.startswith(_STANDARD) and not file.startswith(_INSTALLED)


def source_line(node: Node) -> str | None:
    """`file.py:174`, the innermost frame of the node's stack that is not PyTorch's or ours."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    theirs = [f for f in frames if not is_ours(f[0])] or frames
    return f"{theirs[-1][0]}:{theirs[-1][1]}" if theirs else None


def source_lines(nodes: Iterable[Node]) -> tuple[str, ...]:
    """The distinct lines of several nodes, in order, those recorded by rewrites included."""
    found: dict[str, None] = {}
    for node in nodes:
        for line in (source_line(node), *node.meta.get("custom", {}).get("fuseline_lines", ())):
            if line:
                found[line] = None
    return tuple(found)


def module_path(node: Node) -> str:
    """The qualified name of the innermost module that the node was traced in; "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    for entry in reversed(list(stack.values())):
        path = entry[0] if isinstance(entry, tuple) else str(entry)
        return clean_path(path)
    return ""


def clean_path(path: str) -> str:
    """`L['self']._modules['model'].layers[0]` → `model.layers.0`; slices of module lists are dropped."""
    path = re.sub(r"^[LG]\['[^']*'\]", "", re.sub(r"\.slice\([^)]*\)", "", path))
    path = _INDEX.sub(lambda m: "." + next(g for g in m.groups() if g is not None), path)
    path = re.sub(r"^L\.self\.?|^self\.?", "", path)
    return re.sub(r"\.{2,}", ".", path).strip(".")


def makers(node: Node) -> tuple[str, ...]:
    """The passes and rules that made the node, oldest first, e.g. ("raise/RmsNorm", "fuse/linear")."""
    return tuple((node.meta.get("custom") or {}).get("fuseline", ()))


def add_maker(node: Node, maker: str) -> None:
    """Records one more pass and rule on a node that stays as it is."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), "fuseline": (*makers(node), maker)}


def inherit(node: Node, origins: Sequence[Node], maker: str) -> None:
    """Gives a new node the provenance of what it replaces: the last origin's stack, everybody's lines and makers."""
    for origin in reversed(origins):
        for key in KEPT:
            if key in origin.meta and key not in node.meta:
                node.meta[key] = origin.meta[key]
    custom: dict[str, object] = {}
    for origin in origins:
        custom.update(origin.meta.get("custom", {}))
    chain = dict.fromkeys(m for origin in origins for m in makers(origin))
    node.meta["custom"] = {
        **custom,
        "fuseline": (*chain, maker),
        "fuseline_lines": source_lines(origins),
    }
