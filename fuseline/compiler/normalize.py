"""From any FX graph to normal form: run it under a tracer, then turn state into weight nodes and clean up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import compat
from .errors import CaptureError
from .expressions import Constant, Param
from .inliner import Inliner
from .program import Program, Source
from .provenance import source_line
from .sites import identifier
from .traits import arguments
from .transforms import resolve_transforms

aten = torch.ops.aten
LARGEST_CONSTANT = 65536
_ASSERTIONS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range"}
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}


def normalize(
    module: GraphModule,
    fakes: Sequence[Any],
    mode: Any,
    states: dict[int, Source],
    *,
    names: dict[int, str],
    training: bool,
    examples: Sequence[Any] | None = None,
    call: Callable[..., Any] | None = None,
    runner: Callable[..., Any] | None = None,
) -> Program:
    """Traces `module` on fake inputs; those listed in `states` become weight nodes.

    Args:
        fakes: one fake value for each placeholder; SymInts where sizes are symbolic.
        states: placeholder position → the parameter it is.
        names: readable names for the other placeholders.
        runner: how to run the module when it is not enough to interpret its graph.
    """
    try:
        if runner is None:
            module = resolve_transforms(module, fakes, mode)
        run = runner or (lambda *inputs: Inliner(module).run(*inputs))
        with torch.enable_grad() if training else torch.no_grad():
            traced = compat.trace(run, fakes, mode)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the graph could not be brought to normal form: {type(error).__name__}",
            [line for line in str(error).splitlines() if line.strip()][:6],
            "find the line with TORCH_LOGS=graph_code; replace data-dependent control flow by torch.where",
        ) from error
    graph = traced.graph
    clean(graph, training)  # first of all: what it drops can hide an alias
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    body = next(n for n in graph.nodes if n.op != "placeholder")
    written = _mutated_placeholders(graph, placeholders)
    kept: list[int] = []
    used = set(names.values())
    for position, node in enumerate(placeholders):
        source = states.get(position)
        if source is None or node in written:
            readable = identifier(source.name) if source else names.get(position, node.name)
            node._rename(readable)
            node.meta.setdefault("val", fakes[position])
            node.target = node.name
            used.add(node.name)
            kept.append(position)
            continue
        attribute = identifier(source.name)
        while attribute in used or hasattr(traced, attribute):
            attribute += "_"
        used.add(attribute)
        traced.register_buffer(attribute, node.meta["val"], persistent=False)
        if node.users:
            with graph.inserting_before(body):
                weight = graph.get_attr(attribute)
            weight.meta = {
                **node.meta,
                "weight": _constant(weight, source.tensor) if source.constant else Param(source.name),
            }
            node.replace_all_uses_with(weight)
        graph.erase_node(node)
    write_constants_down(traced)
    functionalize(graph)
    _share_constants(graph)
    clean(graph, training)
    mark_autocast(graph)
    traced.recompile()
    return Program(
        traced,
        mode,
        kept,
        {s.name: s for p, s in states.items() if placeholders[p] not in written},
        frozenset(n.name for n in written),
        training,
        examples,
        call=call,
    )


def clean(graph: torch.fx.Graph, training: bool) -> None:
    """Drops what means nothing (casts to a value's own dtype and device, aliases, assertions, dead code), and writes
    down what depends on the surroundings: the dtype of a constant tensor."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        packet = getattr(node.target, "_opname", "")
        if packet == "full" and node.kwargs.get("dtype") is None:  # else it is whatever the default is at run time
            node.update_kwarg("dtype", node.meta["val"].dtype)
        if packet in _ASSERTIONS and not node.users:
            graph.erase_node(node)
        elif (
            (packet == "to" and _is_identity(node))
            or (packet == "alias" and not _is_handed_out(node))
            or (packet == "slice" and _is_whole_slice(node) and not _is_handed_out(node))
            or (packet in _DROPOUTS and (node.args[1] == 0 or node.args[2] is False))
            or (packet == "detach" and not training and not _is_handed_out(node))
            or (packet == "detach_" and not training)
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _is_identity(node: Node) -> bool:
    """A cast that returns its input: the same dtype and device, no copy and no other memory format asked for."""
    source = node.args[0]
    if not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    copies = node.kwargs.get("copy") or (node.target._opname == "to" and any(a is True for a in node.args[2:]))
    return (
        not copies
        and isinstance(before, torch.Tensor)
        and isinstance(after, torch.Tensor)
        and before.dtype == after.dtype
        and before.device == after.device
        and node.kwargs.get("memory_format") in (None, torch.preserve_format)
        and not any(isinstance(a, torch.memory_format) for a in node.args)
    )


def _is_handed_out(node: Node) -> bool:
    """Whether the caller gets this very tensor: a view or a detached one is then not its source."""
    return any(user.op == "output" for user in node.users)


def mark_autocast(graph: torch.fx.Graph) -> None:
    """Notes on each node the autocast regions it is in (`meta["autocast"]`), so that types there can be computed."""
    regions: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            regions.append(node.args)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            regions.pop()
        elif regions:
            node.meta["autocast"] = tuple(regions)


def _share_constants(graph: torch.fx.Graph) -> None:
    """Drops the fresh copy of a constant that is neither written to nor handed out: then sharing cannot be seen."""
    roots, _ = _storage(graph, [n for n in graph.nodes if n.op != "output"])
    seen_outside = {roots[n] for n in graph.output_node().all_input_nodes if n in roots}
    for node in list(graph.nodes):
        if getattr(node.target, "_opname", "") == "lift_fresh_copy" and not node.meta.get("written"):
            if roots[node] not in seen_outside:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def write_constants_down(module: GraphModule) -> None:
    """Tensors that tracing left as attributes become constants of the weight grammar."""
    for node in module.graph.nodes:
        if node.op != "get_attr" or "weight" in node.meta:
            continue
        tensor = getattr(module, str(node.target))
        if not isinstance(tensor, torch.Tensor):
            continue
        node.meta["weight"] = _constant(node, tensor)


def _constant(node: Node, tensor: torch.Tensor) -> Constant:
    if isinstance(tensor, torch._subclasses.FakeTensor):
        raise CaptureError(
            "a value was computed where the capture does not see it, and would be frozen",
            [f"at {source_line(node)}"],
            "put that call in a function under torch.compiler.disable: the rest is still compiled",
        )
    if tensor.numel() > LARGEST_CONSTANT:
        raise CaptureError(
            f"the model's code builds a constant of {tensor.numel()} elements in its forward",
            [f"at {source_line(node)}"],
            "register it in __init__: self.register_buffer(name, tensor, persistent=False)",
        )
    with compat.real_tensors():
        values = tuple(tensor.flatten().tolist())
    return Constant(values, tuple(tensor.shape), tensor.dtype, str(tensor.device))


def _is_whole_slice(node: Node) -> bool:
    """`x[:]` along some dimension."""
    given = arguments(node)
    start, end, step = given["start"], given["end"], given["step"]
    return start in (0, None) and (end is None or (isinstance(end, int) and end >= 2**62)) and step == 1


def functionalize(graph: torch.fx.Graph) -> None:
    """In-place ops on fresh intermediates become functional twins; where an alias would tell, the nodes are marked.

    An alias tells if it is older than the write and read behind it: it would show what the functional twin leaves as it
    was. The nodes of such a storage carry `meta["written"]`; rules leave them alone.
    Writes to inputs (a KV cache) are the program's declared state and stay as they are.
    """
    roots, writes = _storage(graph, [n for n in graph.nodes if n.op != "output"])
    for root, writers in writes.items():
        names = [n for n, r in roots.items() if r is root]
        twins = [_functional(w) for w in writers]
        known = root.op == "call_function" and all(twins) and all(w.args[0] in roots for w in writers)
        if known and not any(_is_seen(w, names) for w in writers):
            for writer, twin in zip(writers, twins, strict=True):
                operand = writer.args[0]
                for user in [u for u in operand.users if u > writer]:
                    user.replace_input_with(operand, writer)
                writer.target = twin
                _keep_dtype(graph, writer)
        else:
            for node, owner in roots.items():
                if owner is root:
                    node.meta["written"] = True


def _is_seen(writer: Node, names: list[Node]) -> bool:
    """Whether the storage that a node writes to is read behind it by an older name than the node's own."""
    operand = writer.args[0]
    written = set(compat.storages(operand.meta.get("val")))  # type: ignore[union-attr]
    older = [n for n in names if n < writer and n is not operand]
    shared = [n for n in older if not written or not written.isdisjoint(compat.storages(n.meta.get("val")))]
    return any(user > writer for n in shared for user in n.users)


def _keep_dtype(graph: torch.fx.Graph, node: Node) -> None:
    """An in-place op keeps its operand's dtype where the functional one promotes: then a cast follows."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with torch.no_grad():
        promoted = node.target(*args, **kwargs)
    recorded = node.meta["val"]
    if promoted.dtype == recorded.dtype:
        return
    with graph.inserting_after(node):
        cast = graph.call_function(aten.to.dtype, (node, recorded.dtype))
    cast.meta = dict(node.meta)
    node.meta = {**node.meta, "val": promoted}
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)


def _functional(node: Node) -> Any:
    """The functional overload of an in-place op (`relu_` → `relu`), or None."""
    name = getattr(node.target, "_opname", "")
    if not name.endswith("_") or name.endswith("__") or node.target.namespace != "aten":
        return None
    if not isinstance(node.args[0], Node):  # several at once
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, node.target._overloadname, None) if packet is not None else None


def _mutated_placeholders(graph: torch.fx.Graph, placeholders: list[Node]) -> list[Node]:
    """Inputs that some node writes to, directly or through a view."""
    _, writes = _storage(graph, placeholders)
    return [n for n in writes if n in placeholders]


def _storage(graph: torch.fx.Graph, owners: list[Node]) -> tuple[dict[Node, Node], dict[Node, list[Node]]]:
    """Which node's storage each node shares, and who writes to each storage.

    Judged by the storages of the fake values, since schemas leave out some aliases (`dropout` in evaluation, a part of
    `chunk`) and declare others that a copy breaks (`reshape`, `to`); by the schema where there is no fake value.
    """
    roots: dict[Node, Node] = {}
    writes: dict[Node, list[Node]] = {}
    known = set(owners)
    holders: dict[int, Node] = {}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        storages = compat.storages(node.meta.get("val")) if node.op != "output" else ()
        if node.op == "call_function" and schema is not None:
            for position, argument in enumerate(schema.arguments):
                info = argument.alias_info
                value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                if info is not None and info.is_write and isinstance(value, (tuple, list)):  # torch._foreach_add_
                    for one in (n for n in value if n in roots):
                        writes.setdefault(roots[one], []).append(node)
                if info is None or not isinstance(value, Node) or value not in roots:
                    continue
                if info.is_write:
                    writes.setdefault(roots[value], []).append(node)
                if info.is_write or not (storages and compat.storages(value.meta.get("val"))):
                    roots[node] = roots[value]
        held = next((holders[s] for s in storages if s in holders), None)
        if node not in roots and held is not None:
            roots[node] = held
        if node in known and node not in roots:
            roots[node] = node
        if node in roots:
            for storage in storages:
                holders.setdefault(storage, roots[node])
    return roots, writes
