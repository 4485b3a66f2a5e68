"""The expression emitter: a region of pointwise and row ops becomes one Triton kernel.

    x, w ──► x.float() ──► pow, mean, rsqrt ──► mul ──► to bf16 ──► mul w        one launch, x read once

The region is evaluated backwards from its outputs at the index of a tile (`tile.py`): pointwise ops are expressions
(`expressions.py`), ops that only move elements are index arithmetic (`rearrangements.py`), reductions run over whole
rows (`rows.py`, `dialect_rows.py`). Which shape the kernel runs over is tried rather than guessed: each output's
shape, then the rows of each reduction, until every reduction lies along the tile's rows.

Strides and symbolic sizes are read at run time, addresses are computed in int64, and nothing is read on the host.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch

from ..compiler.ops import encode, hadamard, layer_norm, quantize, quantize_affine, rms_norm
from ..compiler.traits import NORMS, REDUCTIONS
from . import creations, dialect_rows, expressions, rearrangements, rows
from .about import about
from .call import Unsupported, dtype_of
from .dtypes import cast, compute_dtype
from .host import Host, Output
from .indexing import reshape
from .kernel import Kernel, Launcher, Refusal
from .kernel_text import call, kernel_source
from .schedule import Domain, Schedule
from .sizes import product, same, shape, size
from .templates import hadamard as transforms
from .templates.hadamard_few import emit_few
from .tile import Tile
from .values import Index, Mask, Term

ROW_RULES = {**rows.RULES, **dialect_rows.RULES}
RULES = {**rearrangements.RULES, **creations.RULES, **ROW_RULES}
ROWS = (rms_norm, layer_norm, quantize, quantize_affine, encode, hadamard)
REDUCING = REDUCTIONS | NORMS | {op.overload for op in ROWS}


def emit_region(region: torch.fx.GraphModule, name: str) -> Launcher | Refusal:
    """One kernel for the whole region, and the host function that launches it.

    Args:
        region: placeholders and calls with `meta["val"]`; its output is a node or a tuple of nodes.
        name: the host function's name; the kernel is called `<name>_kernel`.

    Returns:
        A Launcher whose function takes the region's placeholders in order, or the reason why there is none.
    """
    nodes = list(region.graph.nodes)
    try:
        host = Host(name, nodes)
    except Unsupported as reason:
        return Refusal(str(reason))
    if (few := emit_few(nodes, host)) is not None:
        return few
    reasons: dict[str, None] = {}
    for domain in _domains(nodes, host):
        try:
            return _emit(nodes, host, domain)
        except Unsupported as reason:
            reasons[str(reason)] = None
    return Refusal("; ".join(reasons) or "nothing to compute: the region only returns its inputs")


def _domains(nodes: list[torch.fx.Node], host: Host) -> Iterator[Domain]:
    """Shapes to try: the outputs', those of most dimensions first, then those of the reductions' rows."""
    shapes = sorted((shape(output.node) for output in host.outputs), key=len, reverse=True)
    for node in nodes:
        if node.target in REDUCING:
            shapes += dialect_rows.domains(node)
    shapes += [(*s, 1) for s in shapes]
    for candidate in dict.fromkeys(shapes):
        yield Domain(tuple(candidate[:-1]), candidate[-1] if candidate else 1)


def _emit(nodes: list[torch.fx.Node], host: Host, domain: Domain) -> Launcher:
    tile = Tile(host.sizes, _evaluate)
    tile.pointers = dict(host.inputs)
    for node, text in host.inputs.items():
        tile.reserve(node, text)
    for output in host.outputs:
        tile.reserve(output.node, output.name)
    targets = {n.target for n in nodes}
    schedule = Schedule(
        tile, domain, bool(targets & REDUCING), hadamard.overload in targets, transforms.part(nodes, domain.length)
    )
    full = [o for o in host.outputs if same(product(shape(o.node)), product(domain.shape))]
    by_row = [o for o in host.outputs if o not in full]
    for output in by_row:
        if not same(product(shape(output.node)), domain.rows):
            raise Unsupported(f"{output.node.name} {list(shape(output.node))} does not fit the kernel's rows")
        index = reshape(tile, schedule.tiles[0][0][:-1], domain.lead, shape(output.node))
        _store(tile, output, index, schedule.row_mask)
    if full:
        with tile.loop(schedule.columns):
            for index, mask in schedule.tiles:
                for output in full:
                    _store(tile, output, reshape(tile, index, domain.shape, shape(output.node)), mask)
    launch = schedule.launch()
    source, signature = kernel_source(f"{host.name}_kernel", tile, launch.samples)
    calls = [n for n in nodes if n.op == "call_function" and n.target is not operator.getitem]
    ops, lines, made_by = about(calls)
    kernel = Kernel(
        name=f"{host.name}_kernel",
        source=source,
        signature=signature,
        constants=dict(launch.samples),
        ops=ops,
        lines=lines,
        made_by=made_by,
        num_warps=launch.num_warps,
        num_stages=2,
        buffers=host.buffers(signature),
    )
    return host.launcher(kernel, tile.arguments, domain, launch, rows_only=bool(by_row))


def _store(tile: Tile, output: Output, index: Index, mask: Mask) -> None:
    node = output.node
    value = tile.value(node, index, mask)
    pointer, axes = tile.pointer(node, output.name, index)
    if not value.axes <= axes:
        raise Unsupported(f"{node.name} varies more than its index")
    dtype = dtype_of(node)
    text = cast(value.text, compute_dtype(dtype), dtype)
    conditions = [m.text for m in mask if m.axes <= axes]
    guard = [f"mask={' & '.join(conditions)}"] if conditions else []
    tile.scopes[-1].lines += call("tl.store(", [pointer, text, *guard], ")")


class _Operands(Mapping[torch.fx.Node, str]):
    """A pointwise node's operands, evaluated when its rule asks for them."""

    def __init__(self, tile: Tile, node: torch.fx.Node, index: Index, mask: Mask):
        self.tile, self.index, self.mask = tile, index, mask
        self.nodes = node.all_input_nodes
        self.axes: frozenset[str] = frozenset()

    def __getitem__(self, node: torch.fx.Node) -> str:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            term = self.tile.broadcast(node, self.index, self.mask)
            self.axes |= term.axes
            return term.text
        if not isinstance(value, (int, torch.SymInt)):
            raise Unsupported(f"{node.name} is a {type(value).__name__}, not a tensor or a size")
        return self.tile.bind("number", f"tl.full((), {self.tile.size(size(value))}, tl.int64)").text

    def __iter__(self) -> Iterator[torch.fx.Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, node: object) -> bool:
        return node in self.nodes


def _evaluate(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    """The value of any node of a region at an index: the emitter's one dispatch."""
    if node.op == "placeholder":
        return tile.load(node, index, mask)
    if node.op != "call_function":
        raise Unsupported(f"{node.name} is a {node.op}: weights and constants must be inputs of the region")
    if node.target is operator.getitem:
        parent, k = node.args
        assert isinstance(parent, torch.fx.Node)
        if parent.target in dialect_rows.RESULTS:
            return dialect_rows.RESULTS[parent.target][k](tile, parent, index, mask)  # type: ignore[index]
        if parent.target in rearrangements.RULES:
            return rearrangements.piece(tile, node, index, mask)
        raise Unsupported(f"{parent.target} has several results and no emitter")
    if node.target in RULES:
        try:
            return RULES[node.target](tile, node, index, mask)
        except Unsupported as reason:
            raise _named(node, reason) from None
    _from_the_start(tile, node, index, mask)
    operands = _Operands(tile, node, index, mask)
    text = expressions.emit(node, operands)
    if isinstance(text, Refusal):
        raise Unsupported(text.reason)
    return tile.bind(node.name, text, operands.axes)


def _from_the_start(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> None:
    """Evaluates the pointwise ops before `node` in order, so that a chain's length is not the depth of recursion."""
    key = (*(term.text for term in index), *(term.text for term in mask))
    if key in tile.in_order:
        return
    pending, before = [node], set[torch.fx.Node]()
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand.target in expressions.RULES and operand not in before:
                before.add(operand)
                pending.append(operand)
    tile.in_order.add(key)
    for operand in sorted(before):
        tile.broadcast(operand, index, mask)
    tile.in_order.discard(key)


def _named(node: torch.fx.Node, reason: Unsupported) -> Unsupported:
    """The reason with the node it is about, once."""
    text = str(reason)
    return reason if ": " in text else Unsupported(f"{node.name}: {text}")
