"""Streams: a graph in which the model switches between streams of a device, as offloaded caches do, is refused.

A compiled graph runs on the stream of its caller. What waits for another stream, or copies on one, would be left out
or reordered, and data read before it has arrived: wrong values now and then, which no test would show.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from .errors import UserError
from .provenance import source_line

_FUNCTIONS = {"current_stream", "default_stream", "set_stream", "stream", "new_stream", "get_current_stream"}
_METHODS = {"wait_stream", "record_stream", "record_event", "wait_event", "synchronize"}


def refuse_streams(module: GraphModule) -> None:
    """Refuses a graph of Dynamo's that handles streams.

    Raises:
        UserError: with the first line that does.
    """
    for node in module.graph.nodes:
        if _handles_streams(node):
            raise UserError(
                "the model switches streams of its device, and a compiled graph runs on one",
                [f"at {source_line(node) or 'an unknown line'}: {node.target}"],
                'generate(cache_implementation="static") or the default cache instead of an offloaded one',
            )


def _handles_streams(node: Node) -> bool:
    if (node.meta.get("custom") or {}).get("stream") is not None:
        return True
    if node.op == "call_method":
        return node.target in _METHODS
    namespace = getattr(node.target, "namespace", "") or str(getattr(node.target, "_qualified_op_name", ""))
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and (namespace.startswith("streams") or name in _FUNCTIONS)
