"""Graphs that switch streams, as offloaded caches do, are refused: on one stream data could be read too early."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.variables.streams  # registers the ops
from torch.fx import Graph, GraphModule

import fuseline
from fuseline.compiler.streams import refuse_streams

LINE = 'File "/home/user/cache.py", line 7, in prefetch\n    with self.stream:'


def graph_with(op: str, target: object, *args: object) -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    if op == "call_method":
        node = graph.call_method(target, (x, *args))
    else:
        node = graph.call_function(target, args)
    node.meta["stack_trace"] = LINE
    graph.output(x)
    return GraphModule({}, graph)


@pytest.mark.parametrize(
    ("op", "target", "args"),
    [
        ("call_function", torch.ops.streams.wait_event, (0, 1)),
        ("call_function", torch.ops.streams.record_event.default, (0, 1)),
        ("call_function", torch.cuda.current_stream, ()),
        ("call_method", "record_stream", (0,)),
    ],
)
def test_streams_are_refused(op: str, target: object, args: tuple[object, ...]) -> None:
    with pytest.raises(fuseline.UserError) as caught:
        refuse_streams(graph_with(op, target, *args))
    message = str(caught.value)
    assert "the model switches streams of its device, and a compiled graph runs on one" in message
    assert "at /home/user/cache.py:7" in message
    assert 'try: generate(cache_implementation="static")' in message


def test_a_node_that_dynamo_put_on_a_stream() -> None:
    module = graph_with("call_function", torch.zeros, 2)
    refuse_streams(module)
    next(n for n in module.graph.nodes if n.op == "call_function").meta["custom"] = {"stream": 3}
    with pytest.raises(fuseline.UserError, match="switches streams"):
        refuse_streams(module)
