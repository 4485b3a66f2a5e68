"""The template of sparse linears: `emit_sparse` writes a kernel that reads the kept channels, and one that adds up.

    gather   one chunk of the channels, some columns: Σ over the kept channels of x_j·W_j, into `parts`; and beside it
             some ranks of z = down·(what is dropped)
    finish   the chunks' sums in order, + upᵀ·z, + bias, the pointwise epilogue; the outputs

The end of the first kernel is where `up` may begin: z is whole. Sums have a fixed order, so the same input gives the
same bits; there are no atomics and no buffers to clear. Each row has a mask of its own: a batch reads the union of
channels from memory, and what rows have in common from the cache.

With more rows than `dense_above` (ROWS_MAX where that is 0) the products are PyTorch's, dense or masked as the op says,
and `finish` is given them as one chunk. Sums and epilogues are float32.

Sources: TEAL (Liu et al., 2025) and R-Sparse (Zhang et al., 2025) for masked loads over input-major weights; the order
of sums, the list of kept channels and the place of the low-rank branch are ours.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from ...compiler.ops import sparse_linear
from ...compiler.traits import arguments
from ..about import about
from ..dtypes import pointer_type
from ..kernel import BufferUse, Kernel, Launcher, Out, Refusal
from ..kernel_text import call
from ..sizes import size
from .anchor import COMPUTED, Linear, Reader, Refused, analyse, coded, through_casts, value
from .epilogue import check_operands
from .signature import operands, outputs
from .sparse_gather import (
    GatherConfig,
    Sparse,
    blocks,
    chunks,
    column_blocks,
    finish_kernel,
    gather_arguments,
    gather_kernel,
    padded,
)
from .text import Names, Text
from .weights import Weight

ROWS_MAX = 4
PROGRAMS = 128
"""Programs of the first kernel that a product should have: about one for each multiprocessor of a large GPU."""
WIDE = 400
"""Programs from which the smaller tiles of a wide product pay."""


def emit_sparse(region: GraphModule, name: str, config: GatherConfig | None = None) -> Launcher | Refusal:
    """The kernels of a region of sparse linears and their host function `name`, or why there are none.

    Args:
        region: placeholders, sparse linears of one input and one mask, what dequantizes their weights, pointwise nodes,
            an output; each with `meta["val"]`. The input is [..., K] in float32, float16 or bfloat16.
        config: tile sizes; chosen by shape when absent.
    """
    try:
        sparse = read(region)
        if isinstance(sparse, Refusal):
            return sparse
        check_operands(sparse.anchor)
        config = config or tiles(sparse)
        kernels = (_gather(sparse, f"{name}_gather", config), _finish(sparse, f"{name}_finish", config))
        source, outs = _host(sparse, name, config, kernels)
        return Launcher(name, source, kernels, outs=outs)
    except Refused as refused:
        return Refusal(str(refused))


def tiles(sparse: Sparse) -> GatherConfig:
    """By shape, after measurements on an H200: wide products give every multiprocessor several programs; of others a
    program takes long rows, three of them on their way, and as few channels as make a program for each."""
    stored = max(linear.plain.stored for linear in sparse.anchor.linears)
    bits = max(linear.plain.bits for linear in sparse.anchor.linears)
    most = padded(sparse.anchor.k)

    def config(chunk: int, block_k: int, block_n: int, stages: int) -> GatherConfig:
        chunk = min(chunk, most)
        return GatherConfig(chunk, min(block_k, chunk), min(padded(stored), block_n), compact=True, stages=stages)

    def programs(found: GatherConfig) -> int:
        return column_blocks(sparse, found) * chunks(sparse, found)

    wide = config(512, 16, 256 if bits else 512, 2)
    if programs(wide) >= WIDE:
        return wide
    found = wide if bits else config(512, 8, 1024, 3)
    while programs(found) < PROGRAMS and found.chunk > 128:
        found = replace(found, chunk=found.chunk // 2)
    while programs(found) < PROGRAMS and found.block_n > 128 and not bits:
        found = replace(found, block_n=found.block_n // 2, block_k=min(found.block_k * 2, found.chunk))
    return found


def read(region: GraphModule) -> Sparse | Refusal:
    """A region of sparse linears, or why it is none that the template serves."""
    nodes = [n for n in region.graph.nodes if n.target is sparse_linear.overload]
    given = [arguments(n) for n in nodes]
    if len({(g["threshold"], g["down"], g["dense_above"]) for g in given}) > 1:
        return Refusal("its products have different masks")
    shared = given[0]
    ups = {n: g["up"] for n, g in zip(nodes, given, strict=True) if g["up"] is not None}
    extra: dict[Node, str] = {shared["threshold"]: "threshold"}
    if shared["down"] is not None:
        extra[shared["down"]] = "down"
    extra |= {up: f"up_{i}" if len(ups) > 1 else "up" for i, up in enumerate(ups.values())}
    for node in extra:
        if node.op != "placeholder" or value(node).dtype not in COMPUTED:
            return Refusal(f"{node.name} is computed in the region, or no floating-point number that kernels hold")
        if not all(isinstance(s, int) for s in value(node).shape):
            return Refusal(f"{node.name} has a symbolic size")
    anchor = analyse(region, Reader(sparse_linear.overload, _linear), extra)
    if isinstance(anchor, Refusal):
        return anchor
    return Sparse(anchor, shared["threshold"], shared["down"], ups, shared["dense_above"])


def _linear(node: Node, k: int) -> Linear:
    source, inside = through_casts(node.args[1])
    bias = arguments(node)["bias"]
    if bias is not None and bias.op != "placeholder":
        raise Refused(f"the bias of {node.name} is computed in the region")
    n = value(node.args[1]).shape[1]
    if not isinstance(n, int):
        raise Refused(f"the number of columns of {node.name}'s weight is symbolic ({n})")
    if source.op == "placeholder":
        if value(source).dtype not in COMPUTED:
            raise Refused(f"the weight of {node.name} is {value(source).dtype}")
        return Linear(node, Weight(source, n, frozenset(inside)), bias, n)
    return Linear(node, coded(node, source, inside, n, "outputs"), bias, n)


def _gather(sparse: Sparse, name: str, config: GatherConfig) -> Kernel:
    given = gather_arguments(sparse, config)
    constants = {
        "CHUNK": config.chunk, "BLOCK_K": config.block_k, "BLOCK_N": config.block_n, "STAGES": config.stages,
    }  # fmt: skip
    uses = {p: BufferUse(p, n.name, "read") for p, n in given.items() if isinstance(n, Node)}
    uses |= {p: _shared(sparse, p, what, "write", config) for p, what in given.items() if isinstance(what, str)}
    return _kernel(sparse, name, gather_kernel(sparse, name, config), list(given), constants, config, uses)


def _finish(sparse: Sparse, name: str, config: GatherConfig) -> Kernel:
    names = sparse.anchor.names
    weights = {n for linear in sparse.anchor.linears for n in _stored(linear)}
    read = [n for n in operands(sparse.anchor) if n not in weights]
    pointers = {f"{names[n]}_ptr": n for n in (*sparse.ups.values(), *read)}
    results = {f"{names[n]}_out": n for n in outputs(sparse.anchor)}
    count = chunks(sparse, config)
    constants = {
        "CHUNKS": count, "BLOCK_C": padded(count), "BLOCK_N": config.finish_n, "RANKED": int(sparse.rank > 0),
    }  # fmt: skip
    shared = ["parts_ptr", *(["z_ptr"] if sparse.rank else [])]
    order = [*shared, *pointers, *results]
    uses = {p: _shared(sparse, p, p.removesuffix("_ptr"), "read", config) for p in shared}
    uses |= {p: BufferUse(p, n.name, "read") for p, n in pointers.items()}
    uses |= {p: BufferUse(p, n.name, "write") for p, n in results.items()}
    return _kernel(sparse, name, finish_kernel(sparse, name, order), order, constants, config, uses)


def _shared(sparse: Sparse, pointer: str, what: str, access: str, config: GatherConfig) -> BufferUse:
    """Memory that the two kernels share, or that the first has for itself."""
    width = {"parts": sparse.anchor.columns_of_all, "z": sparse.rank, "index": config.chunk}[what]
    return BufferUse(pointer, what, access, (chunks(sparse, config), "m", width))


def _stored(linear: Linear) -> list[Node]:
    weight = linear.plain
    return [n for n in (weight.tensor, weight.scale, weight.zero) if n is not None]


def _kernel(
    sparse: Sparse,
    name: str,
    source: str,
    pointers: list[str],
    constants: dict[str, int],
    config: GatherConfig,
    uses: dict[str, BufferUse],
) -> Kernel:
    anchor, nodes = sparse.anchor, [n for n in sparse.anchor.x.graph.nodes if n.op == "call_function"]
    types = {f"{name}_ptr": pointer_type(value(n).dtype) for n, name in anchor.names.items() if _is_tensor(n)}
    types |= {f"{anchor.names[n]}_out": pointer_type(value(n).dtype) for n in outputs(anchor)}
    types |= {"parts_ptr": "*fp32", "z_ptr": "*fp32", "index_ptr": "*i32"}
    signature = {p: types[p] for p in pointers} | {"M": "i32"} | dict.fromkeys(constants, "constexpr")
    return Kernel(
        name,
        "".join(f"# {line}\n" for line in _header(sparse)) + source,
        signature,
        dict(constants),
        *about(nodes),
        config.num_warps,
        config.stages,
        tuple(uses[p] for p in pointers),
    )


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _header(sparse: Sparse) -> list[str]:
    """What the kernels compute, and the bytes of the dense weights, as comment lines."""
    anchor = sparse.anchor
    formats = ", ".join(f"{anchor.k} x {linear.n} {linear.plain.title}" for linear in anchor.linears)
    rank = f", rank {sparse.rank}" if sparse.rank else ""
    steps = [f"sparse_linear ({formats}{rank})"]
    steps += dict.fromkeys(n.target._opname for section in anchor.sections for n in section.pointwise)
    dense = sum(anchor.k * linear.plain.row_bytes for linear in anchor.linears)
    return [" → ".join(steps), f"{dense / 1e6:.3g} MB of weights when no channel is dropped"]


def _host(
    sparse: Sparse, name: str, config: GatherConfig, kernels: tuple[Kernel, Kernel]
) -> tuple[str, tuple[Out, ...]]:
    anchor, (gather, finish) = sparse.anchor, kernels
    given = [anchor.names[n] for n in anchor.placeholders]
    names = Names([*given, "torch", "triton", "fuseline", name, gather.name, finish.name])
    rows, m, parts, z, index, count = (names.new(w) for w in ("rows", "m", "parts", "z", "index", "chunks"))
    out = {n: names.new(f"{anchor.names[n]}_out") for n in outputs(anchor)}
    known = {"x_ptr": rows, "parts_ptr": parts, "z_ptr": z, "index_ptr": index}
    known |= {
        f"{anchor.names[n]}_ptr": f"{anchor.names[n]}.contiguous()" for n in anchor.placeholders if n is not anchor.x
    }
    known |= {f"{anchor.names[n]}_out": text for n, text in out.items()}
    text = Text()
    text.add(*call(f"def {name}(", [*given, *(f"{x}=None" for x in out.values())], "):"))
    total, number = anchor.columns_of_all, chunks(sparse, config)
    widths = {n: section.n for section in anchor.sections for n in section.outputs}
    with text.indented():
        text.add(f"{rows} = x.reshape(-1, {anchor.k}).contiguous()", f"{m} = {rows}.shape[0]")
        for n, width in widths.items():
            with text.block(f"if {out[n]} is None:"):
                text.add(f"{out[n]} = torch.empty((*x.shape[:-1], {width}), dtype={value(n).dtype}, device=x.device)")
        limit = min(sparse.dense_above, ROWS_MAX) if sparse.dense_above else ROWS_MAX
        with text.block("with torch.cuda.device_of(x):"):
            with text.block(f"if {m} <= {limit}:"):
                text.add(f"{count} = {number}")
                for what, width, dtype in (
                    (parts, total, "float32"),
                    (z, sparse.rank, "float32"),
                    (index, config.chunk, "int32"),
                ):
                    if width and (what != index or config.compact):
                        text.add(
                            f"{what} = torch.empty(({number}, {m}, {width}), dtype=torch.{dtype}, device=x.device)"
                        )
                values = [known[p] for p in gather.signature if p.endswith("_ptr")]
                grid = f"{m} * {blocks(sparse, config)}, {number}"
                text.add(*call(f"{gather.name}[({grid})](", [*values, m, *_constants(gather)], ")"))
            with text.block("else:"):
                text.add(f"{count} = 1")
                _dense(text, sparse, rows, parts)
                if sparse.rank:
                    text.add(f"{z} = {parts}  # not read")
            values = [known[p] for p in finish.signature if p.endswith(("_ptr", "_out"))]
            ranked = f"int({m} <= {limit})" if sparse.rank else "0"
            chosen = {"CHUNKS": count, "BLOCK_C": f"triton.next_power_of_2({count})", "RANKED": ranked}
            grid = f"{m} * {sum(-(-section.n // config.finish_n) for section in anchor.sections)},"
            text.add(*call(f"{finish.name}[({grid})](", [*values, m, *_constants(finish, chosen)], ")"))
        results = [out[n] for n in anchor.outputs]
        comma = "," if len(results) == 1 else ""
        text.add(f"return ({', '.join(results)}{comma})" if anchor.returns_tuple else f"return {results[0]}")
    lead = tuple(size(s) for s in value(anchor.x).shape[:-1])
    return str(text), tuple(
        Out(out[n], anchor.outputs.index(n), (*lead, width), None, value(n).dtype) for n, width in widths.items()
    )


def _dense(text: Text, sparse: Sparse, rows: str, parts: str) -> None:
    """All products by PyTorch, one beside the other, in float32: those of more rows than the limit, whole; those in
    between, and all without a limit, masked."""
    anchor, products = sparse.anchor, []
    op = "torch.ops.fuseline.sparse_linear.default"
    for linear in anchor.linears:
        tensor = _matrix(linear, anchor.names)
        down = anchor.names[sparse.down] if sparse.down is not None else "None"
        up = anchor.names[sparse.ups[linear.node]] if linear.node in sparse.ups else "None"
        given = [rows, tensor, anchor.names[sparse.threshold], down, up, "None", str(sparse.dense_above)]
        products.append(f"{op}({', '.join(given)}).float()")
    text.add(f"{parts} = torch.cat([", *(f"    {p}," for p in products), "], 1)")


def _matrix(linear: Linear, names: dict[Node, str]) -> str:
    """The weight as a dense tensor, on the host."""
    weight = linear.plain
    if not weight.bits:
        return f"{names[weight.tensor]}"
    scale = names[weight.scale] if weight.scale is not None else "None"
    zero = names[weight.zero] if weight.zero is not None else "None"
    dtype = value(linear.node).dtype
    given = f"{names[weight.tensor]}, {scale}, {zero}, {weight.bits}, {weight.group}, {dtype}"
    return f"torch.ops.fuseline.dequantize.default({given})"


def _constants(kernel: Kernel, chosen: dict[str, str] | None = None) -> list[str]:
    settings = {**kernel.constants, **(chosen or {}), "num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    return [f"{key}={setting}" for key, setting in settings.items()]
