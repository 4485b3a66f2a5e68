"""Graph modules for a compiler's use: most are read as graphs, and few of them ever run.

A GraphModule writes its graph as Python and compiles that whenever it is made or changed. Here it does so when the code
is first read or called, as Inductor's own graphs do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule

try:
    from torch.fx._lazy_graph_module import _LazyGraphModule as _Made
except ImportError:  # a PyTorch that has none: only slower
    _Made = GraphModule  # type: ignore[assignment,misc]


def graph_module(
    root: torch.nn.Module | Mapping[str, Any], graph: Graph, class_name: str = "GraphModule"
) -> GraphModule:
    """`torch.fx.GraphModule(root, graph, class_name)`, whose code is written when it is first needed."""
    return _Made(root, graph, class_name=class_name)  # type: ignore[arg-type]
