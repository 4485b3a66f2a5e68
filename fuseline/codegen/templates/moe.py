"""The template of routed experts: `emit_moe`, for `fuseline::moe` and `fuseline::moe_pairs`.

    one token      up, down                 no sorting: `experts/one.py`; of codes up, down, sum: `tile.py`
    more tokens    route, up, down, sum     sorted by expert on the device, products of a group's tokens: `route.py`,
                                            `tile.py`

Experts of codes with low ranks have a small product before each of the two: `lowrank.py`.

With few tokens for each expert the bytes of the experts that are touched are the floor, and each is read once; packed
pairs are then read once for both of their experts. With many the products are bound by arithmetic. Which kernels run
depends on the number of tokens alone: nothing waits for the routing, a captured CUDA graph serves any. The sum over a
token's experts has an order, so the same inputs give the same bits.

Sources: vLLM's fused experts and X-MoE (Yuan et al., 2025) for the layout; Triton's grouped products.

Precision: sums, gates and routing weights are float32. The middle, and with more than one token each expert's product,
are rounded to the tokens' type, as in the op's naive twin.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from ..about import about
from ..dtypes import pointer_type
from ..kernel import BufferUse, Kernel, Launcher, Out, Refusal
from ..kernel_text import call
from ..sizes import size
from .coded.host import _bytes, _pointer
from .config import next_power_of_two
from .experts import lowrank, one, route, tile
from .experts.config import RowConfig, TileConfig, Tiling, low_rank, tiling
from .experts.read import RANKS, Experts, read
from .text import Names, Text, is_nvidia

SUM_BLOCK = 1024
LEAST = 16  # tokens of a tile
ROUTED = (128, 1024, 4096)  # choices that a program of the routing looks at together, by how many there are

Shape = tuple[int | str, ...]


def emit_moe(region: GraphModule, name: str, tiles: Tiling | None = None) -> Launcher | Refusal:
    """The kernels of a region that is one call of routed experts, and their host function `name`, or a refusal.

    Args:
        region: the op, and what expands its matrices of codes; hidden [T, H], where T may be symbolic; other sizes are
            numbers.
        name: of the host function; kernels are called `<name>_up_one`, ….
        tiles: tile sizes; chosen by shape when absent.
    """
    experts = read(region)
    if isinstance(experts, Refusal):
        return experts
    tiles = tiles or tiling(experts)
    kernels = _kernels(experts, name, tiles)
    out = Out("out", 0, (size(experts.given["hidden"].meta["val"].shape[0]), experts.hidden), None, experts.dtype)
    return Launcher(name, _host(experts, name, tiles, kernels), tuple(kernels.values()), outs=(out,))


def _kernels(experts: Experts, name: str, tiles: Tiling) -> dict[str, Kernel]:
    """By what they are for: up_one, down_one, route_few, route_many, up_few, down_few, up_many, down_many, sum."""
    found: dict[str, Kernel] = {}
    for part in _parts(experts, tiles):
        found[part.tag] = _kernel(experts, f"{name}_{part.tag}", part)
    return found


@dataclass(frozen=True)
class _Part:
    """One kernel of the region: the pointers that it writes, and those that are read as words of two numbers."""

    tag: str
    body: str
    constants: dict[str, int]
    writes: tuple[str, ...]
    scalars: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 1


def _parts(experts: Experts, tiles: Tiling) -> Iterator[_Part]:
    for tag, config, writer, token, written in () if experts.coded else (
        ("up", tiles.one.up, one.up_body, "hidden", ("act", "places")),
        ("down", tiles.one.down, one.down_body, "act", ("out",)),
    ):  # fmt: skip
        assert isinstance(config, RowConfig)
        constants = {"BLOCK_N": config.block_n, "ELEMENTS": config.elements, "STAGES": config.stages}
        words = (token, "gate_up", "down") if experts.pairs else ()
        yield _Part(f"{tag}_one", writer(experts, config), constants, written, (), words, config.num_warps)
    for kind, stage in (*((("one", tiles.few),) if experts.coded else ()), ("few", tiles.few), ("many", tiles.many)):
        dual = experts.pairs and kind == "few"
        if kind == "few" or (kind == "many" and experts.pairs):
            constants = {"BLOCK": ROUTED[0], "KEYS": route.bins(experts, dual)}
            yield _Part(f"route_{kind}", route.route_body(experts, dual), constants, ("order", "tiles"), route.SCALARS)
        for tag, config, body, result in (
            ("up", stage.up, tile.up_body, "act"), ("down", stage.down, tile.down_body, "parts"),
        ):  # fmt: skip
            assert isinstance(config, TileConfig)
            values = (LEAST if kind == "one" else config.block_m, config.block_n, config.block_k, config.group_m)
            constants = dict(zip(tile.CONSTANTS, values, strict=True))
            text = body(experts, config, kind)
            launch = (config.num_warps, config.stages)
            matrices = experts.gate_up if tag == "up" else experts.down
            if matrices.words:
                constants["PTX"] = False
            if matrices.low is not None:
                small = low_rank(config, experts.dtype)
                own = constants | {"BLOCK_N": small.block_n, "BLOCK_K": small.block_k}
                low = lowrank.low_body(experts, matrices, small, kind)
                yield _Part(f"low_{tag}_{kind}", low, own, ("low",), tile.SCALARS, (), small.num_warps, small.stages)
            yield _Part(f"{tag}_{kind}", text, constants, (result,), tile.SCALARS, (), *launch)
    block = min(SUM_BLOCK, next_power_of_two(experts.hidden))
    yield _Part("sum", tile.sum_body(experts), {"BLOCK_N": block}, ("out",))


def _pointers(experts: Experts, words: Collection[str]) -> dict[str, tuple[str, str, Shape | None]]:
    """Of every pointer that a kernel may have: its type, the value behind it, its shape where that is scratch."""
    found: dict[str, tuple[str, str, Shape | None]] = {}
    for name, node in experts.tensors.items():
        found[name] = ("*i32" if name in words else _pointer(node.meta["val"].dtype), node.name, None)
    kind = pointer_type(experts.dtype)
    found["order"] = ("*i32", "order", ("s",))
    found["tiles"] = ("*i32", "table", ("tiles + 1", 4))
    found["act"] = ("*i32" if "act" in words else kind, "act", ("s", experts.inner))
    found["places"] = ("*i32", "places", (experts.top,))
    found["low"] = (kind, "low", ("s", experts.most_ranks))
    found["parts"] = (kind, "parts", ("s", experts.hidden))
    found["out"] = (kind, experts.node.name, None)
    return found


def _kernel(experts: Experts, name: str, part: _Part) -> Kernel:
    """A kernel with the arguments that its body mentions."""
    pointers = _pointers(experts, part.words)
    used = {p: found for p, found in pointers.items() if re.search(rf"\b{p}_ptr\b", part.body)}
    parameters = [*(f"{p}_ptr" for p in used), *part.scalars, *(f"{c}: tl.constexpr" for c in part.constants)]
    quoted = ", ".join(f'"{scalar}"' for scalar in part.scalars)
    plain = f"(do_not_specialize=[{quoted}])" if part.scalars else ""
    lines = [f"@triton.jit{plain}", *call(f"def {name}(", parameters, "):"), part.body]
    heading = [experts.title, f"{experts.expert_bytes / 1e6:.3g} MB for each {'pair' if experts.pairs else 'expert'}"]
    return Kernel(
        name,
        "\n".join([*(f"# {line}" for line in heading), *lines]),
        {f"{p}_ptr": kind for p, (kind, _, _) in used.items()}
        | dict.fromkeys(part.scalars, "i32")
        | dict.fromkeys(part.constants, "constexpr"),
        dict(part.constants),
        *about([experts.node]),
        part.num_warps,
        part.num_stages,
        tuple(
            BufferUse(f"{p}_ptr", value, "write" if p in part.writes else "read", shape)
            for p, (_, value, shape) in used.items()
        ),
    )


def _host(experts: Experts, name: str, tiles: Tiling, kernels: dict[str, Kernel]) -> str:
    given, top = experts.given, experts.top
    local = "torch triton fuseline x m s block_m tiles order table act places low parts out block min"
    names = Names([*local.split(), name, *(k.name for k in kernels.values())])
    wishes = {node: argument for argument, node in reversed(experts.tensors.items())}
    text_of = {node: names.new(wishes.get(node, node.name)) for node in experts.placeholders}
    value = {argument: text_of[node] for argument, node in experts.tensors.items()}
    known: dict[str, str] = {}
    view = ".view(torch.int32)" if experts.pairs else ""
    for argument, node in experts.tensors.items():
        known[f"{argument}_ptr"] = f"{_bytes(node, value[argument])}.contiguous()"
    for matrices in () if experts.coded else (experts.gate_up, experts.down):
        known[f"{matrices.name}_ptr"] = value[matrices.name]
    known |= {"hidden_ptr": "x", "order_ptr": "order", "tiles_ptr": "table", "act_ptr": "act", "parts_ptr": "parts"}
    known |= {"low_ptr": "low", "out_ptr": "out", "S": "s", "block_m": "block_m", "tiles": "tiles"}
    known["places_ptr"] = "places"
    text = Text()

    def launch(tag: str, grid: str, **chosen: str) -> None:
        kernel = kernels[tag]
        values = [known[p] for p in kernel.signature if p not in kernel.constants]
        if experts.gate_up.words and tag in ("up_one", "down_one"):
            viewed = ["x" if tag == "up_one" else "act", value["gate_up" if tag == "up_one" else "down"]]
            values = [v + view if v in viewed else v for v in values]
        chosen["PTX"] = is_nvidia("x")
        values += [f"{c}={chosen.get(c, setting)}" for c, setting in kernel.constants.items()]
        text.add(
            *call(
                f"{kernel.name}[({grid})](",
                [*values, f"num_warps={kernel.num_warps}", f"num_stages={kernel.num_stages}"],
                ")",
            )
        )

    def scratch(variable: str, shape: str, dtype: torch.dtype) -> None:
        text.add(f"{variable} = torch.empty({shape}, dtype={dtype}, device=x.device)")

    def products(kind: str, **chosen: str) -> None:
        for tag, matrices in (("up", experts.gate_up), ("down", experts.down)):
            if matrices.low is not None:
                launch(f"low_{tag}_{kind}", f"tiles * {_blocks(matrices.low.most, RANKS)},", **chosen)
            columns = experts.inner if tag == "up" else experts.hidden
            blocks = _blocks(columns, kernels[f"{tag}_{kind}"].constants["BLOCK_N"])
            launch(f"{tag}_{kind}", f"tiles * {blocks},", **chosen)

    text.add(*call(f"def {name}(", [*text_of.values(), "out=None"], "):"))
    with text.indented():
        if not experts.coded:
            strides = " or ".join(f"{value[m.name]}.stride() != {m.strides}" for m in (experts.gate_up, experts.down))
            with text.block(f"if {strides}:  # not the layout that the kernels were written for"):
                order = [value.get(a, repr(given[a])) for a in given]
                text.add(
                    *call(
                        f"return torch.ops.{experts.node.target._schema.name.replace('::', '.')}.default(", order, ")"
                    )
                )
        text.add(f"x, m = {value['hidden']}.contiguous(), {value['hidden']}.shape[0]")
        with text.block("if out is None:"):
            text.add(f"out = torch.empty((m, {experts.hidden}), dtype={experts.dtype}, device=x.device)")
        with text.block("with torch.cuda.device_of(x):"):
            with text.block("if m == 1:"):
                scratch("act", f"({top}, {experts.inner})", experts.dtype)
                up, down = (kernels[f"{tag}_one"].constants["BLOCK_N"] for tag in ("up", "down"))
                if experts.coded:
                    if experts.most_ranks:
                        scratch("low", f"({top}, {experts.most_ranks})", experts.dtype)
                    scratch("parts", f"({top}, {experts.hidden})", experts.dtype)
                    text.add(f"tiles = {top}")
                    products("one")
                    launch("sum", f"1, {_blocks(experts.hidden, kernels['sum'].constants['BLOCK_N'])}")
                else:
                    if experts.pairs:
                        scratch("places", f"({top},)", torch.int32)
                    launch("up_one", f"{top}, {_blocks(experts.inner, up)}")
                    launch("down_one", f"{_blocks(experts.hidden, down)},")
            with text.block("elif m > 1:"):
                text.add(f"s = m * {top}")
                _tile_size(text, experts, tiles)
                text.add("block = " + " else ".join([*(f"{b} if s <= {b}" for b in ROUTED[:-1]), str(ROUTED[-1])]))
                scratch("order", "s", torch.int32)
                scratch("act", f"(s, {experts.inner})", experts.dtype)
                if experts.most_ranks:
                    scratch("low", f"(s, {experts.most_ranks})", experts.dtype)
                scratch("parts", f"(s, {experts.hidden})", experts.dtype)
                for kind, head in (("few", f"if block_m < {_many(tiles)}:"), ("many", "else:")):
                    with text.block(head):
                        dual = experts.pairs and kind == "few"
                        groups = route.groups(experts, dual)
                        text.add(f"tiles = min(s, s // block_m + {groups})")
                        scratch("table", "(tiles + 1, 4)", torch.int32)
                        launch(f"route_{kind}" if experts.pairs else "route_few", f"{groups},", BLOCK="block")
                        products(kind, BLOCK_M="block_m")
                launch("sum", f"m, {_blocks(experts.hidden, kernels['sum'].constants['BLOCK_N'])}")
        text.add("return out")
    return str(text)


def _many(tiles: Tiling) -> int:
    """The tokens of a tile where `many` serves."""
    assert isinstance(tiles.many.up, TileConfig)
    return tiles.many.up.block_m


def _tile_size(text: Text, experts: Experts, tiles: Tiling) -> None:
    """Tokens of a tile, by the mean of a group: packed pairs make one group of two experts until `many` serves."""
    assert isinstance(tiles.few.up, TileConfig)
    most, steps = tiles.few.up.block_m, []
    for mean, block in zip(tiles.means, (16, 32, 64), strict=True):
        limit = mean * experts.keys // experts.top
        if block <= most and block < _many(tiles) and limit >= 1:
            steps.append(f"{block} if m <= {limit}")
    text.add("block_m = " + " else ".join([*steps, str(_many(tiles))]))


def _blocks(columns: int, block: int | float | bool) -> int:
    return -(-columns // int(block))
