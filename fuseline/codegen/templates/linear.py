"""The template of linear layers: `emit_linear` writes two kernels and the function that picks one by the row count.

Served: x → optional norm → one or several linears of the same input, with float, int8 or int4 weights → pointwise
epilogue → one or several outputs. `anchor.py` says what a region may hold, `gemv.py` and `gemm.py` what is launched.
Weights of other formats, laid out in words, and products of codes go to `coded/` (codegen/repack.py).

Precision: sums, norms and epilogues are float32. With one row to a program nothing is rounded before the output; the
many-row kernel rounds h and dequantized weights to the graph's dtype of h. Both are at least as close to the exact
value as the graph, which rounds after every op.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ..about import about
from ..kernel import Kernel, Launcher, Out, Refusal
from ..kernel_text import call
from ..sizes import size
from . import gemm, gemv
from .anchor import Anchor, Refused, analyse, value
from .coded.config import CodedTiling
from .coded.host import emit_coded
from .coded.weight import Coded
from .config import FEW_ROWS_BLOCK_M, FEW_ROWS_MAX, RowConfig, TileConfig, Tiling, tiling
from .epilogue import check_operands
from .signature import arguments, buffers, operands, outputs, signature
from .text import Names, Text


def emit_linear(region: GraphModule, name: str, tiles: Tiling | CodedTiling | None = None) -> Launcher | Refusal:
    """The kernels of a linear region and their host function `name`, or why there are none.

    Args:
        region: placeholders, at most one norm, linears of one input, pointwise nodes, an output; each node with
            `meta["val"]`. The input is [..., K] in float32, float16 or bfloat16; leading sizes may be symbolic.
        name: of the host function; kernels are called `<name>_row` and `<name>_tile`.
        tiles: tile sizes; chosen by shape when absent.
    """
    anchor = analyse(region)
    if isinstance(anchor, Refusal):
        return anchor
    if any(isinstance(linear.weight, Coded) for linear in anchor.linears):
        heading = "".join(f"# {line}\n" for line in header(anchor))
        return emit_coded(
            anchor, name, about(region_nodes(anchor)), heading, tiles if isinstance(tiles, CodedTiling) else None
        )
    if not isinstance(tiles, Tiling):
        tiles = tiling(anchor)
    try:
        check_operands(anchor)
        kernels = (_row(anchor, f"{name}_row", tiles.row), _tile(anchor, f"{name}_tile", tiles.tile))
        source, outs = _host(anchor, name, tiles, kernels)
        return Launcher(name, source, kernels, outs=outs)
    except Refused as refused:
        return Refusal(str(refused))


def _row(anchor: Anchor, name: str, config: RowConfig) -> Kernel:
    constants = {"BLOCK_N": config.block_n, "ELEMENTS": config.elements, "STAGES": config.stages}
    source = gemv.row_kernel(anchor, name, config)
    return _kernel(anchor, name, source, constants, config.num_warps, 1)


def _tile(anchor: Anchor, name: str, config: TileConfig) -> Kernel:
    constants = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
    }  # fmt: skip
    source = gemm.tile_kernel(anchor, name, config)
    return _kernel(anchor, name, source, constants, config.num_warps, config.stages)


def _kernel(
    anchor: Anchor, name: str, source: str, constants: dict[str, int], num_warps: int, num_stages: int
) -> Kernel:
    return Kernel(
        name,
        "".join(f"# {line}\n" for line in header(anchor)) + source,
        signature(arguments(anchor), tuple(constants)),
        dict(constants),
        *about(region_nodes(anchor)),
        num_warps,
        num_stages,
        buffers(anchor),
    )


def region_nodes(anchor: Anchor) -> list[Node]:
    """The calls that the kernels stand for, in graph order."""
    return [n for n in anchor.x.graph.nodes if n.op == "call_function"]


def header(anchor: Anchor) -> list[str]:
    """What the kernel computes and the bytes it cannot avoid, as comment lines."""
    formats = ", ".join(f"{linear.n} x {anchor.k} {linear.weight.title}" for linear in anchor.linears)
    steps = [anchor.norm.node.target._opname] if anchor.norm else []
    steps.append(f"linear ({formats})")
    steps += dict.fromkeys(n.target._opname for section in anchor.sections for n in section.pointwise)
    read = sum(linear.n * linear.weight.row_bytes for linear in anchor.linears)
    return [" → ".join(steps), f"reads {_bytes(read)} of weights: their transfer is the floor for one row"]


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} KB"


def _host(anchor: Anchor, name: str, tiles: Tiling, kernels: tuple[Kernel, Kernel]) -> tuple[str, tuple[Out, ...]]:
    """The host function, and what it may be given to write to. Each kind of launch is one branch on the row count."""
    text = Text()
    given = [anchor.names[n] for n in anchor.placeholders]
    row, tile = kernels
    names = Names([*given, "torch", "triton", name, row.name, tile.name])
    rows, m, block_m = names.new("rows"), names.new("m"), names.new("block_m")
    out = {n: names.new(f"{anchor.names[n]}_out") for n in outputs(anchor)}
    tensors = [rows, *(f"{anchor.names[n]}.contiguous()" for n in operands(anchor)), *out.values(), m]
    text.add(*call(f"def {name}(", [*given, *(f"{x}=None" for x in out.values())], "):"))
    with text.indented():
        text.add(f"{rows} = x.reshape(-1, {anchor.k}).contiguous()", f"{m} = {rows}.shape[0]")
        for n, width in _widths(anchor).items():
            with text.block(f"if {out[n]} is None:"):
                text.add(f"{out[n]} = torch.empty((*x.shape[:-1], {width}), dtype={value(n).dtype}, device=x.device)")
        with text.block("with torch.cuda.device_of(x):"):
            with text.block(f"if {m} <= {tiles.row_max}:"):
                grid = f"{m} * {_blocks(anchor, tiles.row.block_n)}"
                text.add(*call(f"{row.name}[({grid},)](", [*tensors, *_constants(row)], ")"))
            with text.block("else:"):
                few = min(FEW_ROWS_BLOCK_M, tiles.tile.block_m)
                text.add(f"{block_m} = {few} if {m} <= {FEW_ROWS_MAX} else {tiles.tile.block_m}")
                grid = f"triton.cdiv({m}, {block_m}) * {_blocks(anchor, tiles.tile.block_n)}"
                text.add(*call(f"{tile.name}[({grid},)](", [*tensors, *_constants(tile, BLOCK_M=block_m)], ")"))
        results = [out[n] for n in anchor.outputs]
        if anchor.returns_tuple:
            text.add(f"return ({', '.join(results)}{',' if len(results) == 1 else ''})")
        else:
            text.add(f"return {results[0]}")
    lead = tuple(size(s) for s in value(anchor.x).shape[:-1])
    return str(text), tuple(
        Out(out[n], anchor.outputs.index(n), (*lead, width), None, value(n).dtype)
        for n, width in _widths(anchor).items()
    )


def _widths(anchor: Anchor) -> dict[Node, int]:
    """The columns of each output."""
    return {n: section.n for section in anchor.sections for n in section.outputs}


def _blocks(anchor: Anchor, block_n: int) -> int:
    """Programs along the columns of all sections."""
    return sum(-(-section.n // block_n) for section in anchor.sections)


def _constants(kernel: Kernel, **chosen: str) -> list[str]:
    constants = {**kernel.constants, **chosen, "num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    return [f"{key}={setting}" for key, setting in constants.items()]
