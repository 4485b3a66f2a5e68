"""What a region of routed experts is made of: sizes, types, and how the experts' matrices lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ....compiler.ops import decode_pair_words, decode_words, find, lowrank_add
from ....compiler.ops.moe import CLAMPED
from ....compiler.products import rows_of_codes
from ....compiler.traits import arguments, is_view
from ...formulas import ACTIVATIONS
from ...kernel import Refusal
from ..coded.weight import Coded
from .pairs import CodedPairs

COMPUTED = (torch.float32, torch.float16, torch.bfloat16)
RANKS = 16
"""Low ranks of a tile, and of a turn of a loop."""

TENSORS = ("hidden", "indices", "weights", "gate_up", "down", "rows", "slots", "gate_up_bias", "down_bias")


@dataclass(frozen=True)
class LowRank:
    """Low ranks of a stack: factors up [R, height] and down [R, width], numbers or int8 codes with a scale a row;
    starts [E + 1], where each expert's rows begin. `nodes` are the graph nodes that the kernels replace."""

    factors: dict[str, Node]
    scales: dict[str, Node | None]
    starts: Node
    ranks: tuple[int, ...]
    nodes: frozenset[Node]

    @property
    def most(self) -> int:
        """Of an expert, in whole tiles."""
        return -(-max(self.ranks) // RANKS) * RANKS

    @property
    def tensors(self) -> dict[str, Node]:
        found = {f"low_{part}": node for part, node in self.factors.items()}
        found |= {f"low_{part}_scale": node for part, node in self.scales.items() if node is not None}
        return found | {"starts": self.starts}


@dataclass(frozen=True)
class Matrices:
    """One matrix an expert (or a pair), [count, height, width]; `strides` are those of its three dimensions.

    words: of pairs (`words.py`), which lie whole two by two. coded: codes of all experts'
    rows, in the layout of `coded/`; strides are then of no meaning. low: what is added to the products of codes.
    """

    name: str
    height: int
    width: int
    strides: tuple[int, int, int]
    words: bool
    coded: Coded | None = None
    low: LowRank | None = None

    @property
    def across(self) -> bool:
        """Whether neighbours in memory are of different rows: a transposed matrix."""
        return self.strides[1] == 1 and self.strides[2] != 1


@dataclass(frozen=True)
class Experts:
    """A region that is one `fuseline::moe` or `fuseline::moe_pairs`.

    hidden: H, channels of a token; inner: I, of an expert's middle; experts: E; top: K experts a token; keys: groups
    that tokens are sorted into: experts, or rows of words. dtype: of hidden, in which products are taken.
    """

    node: Node
    given: dict[str, Any]
    placeholders: tuple[Node, ...]
    hidden: int
    inner: int
    experts: int
    top: int
    keys: int
    dtype: torch.dtype
    gate_up: Matrices
    down: Matrices

    @property
    def pairs(self) -> bool:
        """Whether a row of a matrix holds two experts."""
        return self.gate_up.words or isinstance(self.gate_up.coded, CodedPairs)

    @property
    def most_ranks(self) -> int:
        """Of an expert, in either stack."""
        return max((m.low.most for m in (self.gate_up, self.down) if m.low is not None), default=0)

    @property
    def tensors(self) -> dict[str, Node]:
        """The op's tensors: argument → placeholder."""
        found: dict[str, Node] = {}
        for name in TENSORS:
            matrices = {"gate_up": self.gate_up, "down": self.down}.get(name)
            if matrices is not None and (coded := matrices.coded) is not None:
                parts = {"codes": coded.tensor, "scale": coded.scale, "zero": coded.zero, "outer": coded.outer}
                found |= {f"{name}_{part}": node for part, node in parts.items() if node is not None}
                if isinstance(coded, CodedPairs):
                    found |= dict(zip(("rows", "slots"), coded.places, strict=True))
                if matrices.low is not None:
                    found |= {f"{name}_{part}": node for part, node in matrices.low.tensors.items()}
            elif isinstance(self.given.get(name), Node):
                found[name] = self.given[name]
        return found

    @property
    def coded(self) -> bool:
        return self.gate_up.coded is not None

    @property
    def gate_step(self) -> tuple[int, int]:
        """Between the rows of neighbouring gates, and between a gate's and its up's, in rows of gate_up."""
        return (2, 1) if self.given["interleaved"] else (1, self.inner)

    @property
    def title(self) -> str:
        """The first line of the kernels' headings."""
        kind = "pairs of" if self.pairs else str(self.gate_up_dtype).removeprefix("torch.")
        if self.gate_up.coded is not None:
            kind = self.gate_up.coded.title + (" and low ranks" if self.most_ranks else "")
        return f"{self.top} of {self.experts} experts, {kind} {self.hidden} x {self.inner}, {self.given['activation']}"

    @property
    def gate_up_dtype(self) -> torch.dtype:
        return self.given["gate_up"].meta["val"].dtype  # type: ignore[no-any-return]

    @property
    def expert_bytes(self) -> int:
        """Of one expert's matrices, or of one pair's."""
        if self.gate_up.coded is not None and self.down.coded is not None:
            return 2 * self.inner * self.gate_up.coded.row_bytes + self.hidden * self.down.coded.row_bytes
        itemsize: int = self.gate_up_dtype.itemsize
        return 3 * self.hidden * self.inner * itemsize


def read(region: GraphModule) -> Experts | Refusal:
    """A region's experts, or why the template does not serve them."""
    calls = [n for n in region.graph.nodes if n.op == "call_function"]
    op = find(calls[-1].target) if calls else None
    if op is None or op.name not in ("moe", "moe_pairs"):
        return Refusal("the region is not one call of routed experts")
    node, given, pairs = calls[-1], arguments(calls[-1]), op.name == "moe_pairs"
    codes, low = {}, {}
    for name in ("gate_up", "down"):
        low[name] = _low_rank(given[name])
        codes[name] = _coded(given[name] if low[name] is None else arguments(given[name])["base"])
        for made in (low[name], codes[name]):
            if isinstance(made, str):
                return Refusal(f"{name} {made}")
    held = [*codes.values(), *low.values()]
    if {*calls} != {node}.union(*(made.nodes for made in held if isinstance(made, Coded | LowRank))):
        return Refusal("the region is not one call of routed experts")
    if (codes["gate_up"] is None) != (codes["down"] is None):
        return Refusal("codes of one of its matrices, and numbers of the other")
    places = {c.places for c in codes.values() if isinstance(c, CodedPairs)}
    if len(places) > 1 or (places and not all(isinstance(c, CodedPairs) for c in codes.values())):
        return Refusal("experts that are paired otherwise in its two stacks")
    value = {name: given[name].meta["val"] for name in TENSORS if given.get(name) is not None}
    if len({v.device for v in value.values()}) > 1:
        return Refusal("its tensors lie on several devices")
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        if name in value and not all(isinstance(s, int) for s in (*value[name].shape, *value[name].stride())):
            return Refusal(f"{name} has a symbolic size")
    dtype, (_, twice, hidden) = value["hidden"].dtype, value["gate_up"].shape
    top = value["indices"].shape[1]
    if not isinstance(top, int) or top == 0:
        return Refusal(f"{top} experts for each token")
    if min(twice, hidden, value["gate_up"].shape[0]) == 0:
        return Refusal("experts without weights")
    if dtype not in COMPUTED:
        return Refusal(f"tokens of {dtype}: kernels compute in float32, float16 and bfloat16")
    if value["weights"].dtype not in COMPUTED:
        return Refusal(f"routing weights of {value['weights'].dtype}")
    if given["activation"] != CLAMPED and given["activation"] not in ACTIVATIONS:
        return Refusal(f"activation {given['activation']}")
    refused = _pairs(value) if pairs else None if codes["gate_up"] else _plain(value)
    if refused:
        return Refusal(refused)
    matrices = [_matrices(name, value[name], pairs, codes[name], low[name]) for name in ("gate_up", "down")]
    experts, keys = value["rows" if pairs else "gate_up"].shape[0], value["gate_up"].shape[0]
    if isinstance(first := codes["gate_up"], CodedPairs):
        keys = _shape(first.scale)[0]
    placeholders = tuple(n for n in region.graph.nodes if n.op == "placeholder")
    return Experts(node, given, placeholders, hidden, twice // 2, experts, top, keys, dtype, *matrices)


def _plain(value: dict[str, torch.Tensor]) -> str | None:
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        if name in value and value[name].dtype not in COMPUTED:
            return f"{name} of {value[name].dtype}"
    return None


def _pairs(value: dict[str, torch.Tensor]) -> str | None:
    """Why packed pairs do not fit: two neighbouring words are loaded as one int32."""
    if value["hidden"].dtype != torch.bfloat16:
        return f"packed pairs are bfloat16, and the tokens {value['hidden'].dtype}"
    for name in ("gate_up", "down"):
        *outer, last = value[name].stride()
        if value[name].shape[-1] % 2 or last != 1 or any(stride % 2 for stride in outer):
            return f"rows of {name} that are not whole pairs of neighbouring words"
    return None


def _low_rank(matrix: Node) -> LowRank | str | None:
    """The low ranks that are added to a stack; None where there are none; or why kernels do not read them."""
    if matrix.target is not lowrank_add.overload:
        return None
    given = arguments(matrix)
    if given["starts"] is None or given["starts"].op != "placeholder":
        return "has low ranks, and no tensor says where they begin"
    factors, nodes = {}, {matrix}
    scales: dict[str, Node | None] = {}
    for part in ("up", "down"):
        factor, scales[part] = given[part], None
        if (codes := rows_of_codes(factor)) is not None:
            nodes.add(factor)
            factor, scales[part] = codes
        if any(n is not None and n.op != "placeholder" for n in (factor, scales[part])):
            return f"has low ranks whose {part} is computed in the region"
        if factor.meta["val"].dtype not in (*COMPUTED, torch.int8):
            return f"has low ranks of {factor.meta['val'].dtype}"
        if not all(isinstance(size, int) for size in _shape(factor)):
            return "has low ranks of a symbolic size"
        factors[part] = factor
    return LowRank(factors, scales, given["starts"], tuple(given["ranks"]), frozenset(nodes))


def _coded(matrix: Node) -> Coded | str | None:
    """The codes behind a stack of matrices; None where it is a tensor; or why kernels do not read them."""
    inside = set()
    while matrix.op == "call_function" and is_view(matrix.target):
        inside.add(matrix)
        matrix = matrix.args[0]  # type: ignore[assignment]
    if matrix.op == "placeholder":
        return f"goes through {', '.join(str(n.target) for n in inside)} in the region" if inside else None
    pairs = matrix.target is decode_pair_words.overload
    if not pairs and matrix.target is not decode_words.overload:
        return f"is computed in the region, by {matrix.target}"
    given = arguments(matrix)
    places = (given["rows"], given["slots"]) if pairs else ()
    for operand in (given["codes"], given["scale"], given.get("zero"), given.get("outer"), *places):
        if operand is not None and operand.op != "placeholder":
            return f"has {operand.name}, which is computed in the region"
    if not given["run"]:
        return "is codes of a byte each"
    sizes = _shape(given["scale"])
    if not all(isinstance(size, int) for size in sizes) or prod(sizes) >= 2**31:
        return "has scales of a symbolic number, or more than 2^31"
    width, nodes = sizes[-2] * given["group"], frozenset(inside | {matrix})
    front = (given["codes"], width, nodes, given["format"], given["group"], given["run"], given["scale"])
    return CodedPairs(*front, places=places) if pairs else Coded(*front, given["zero"], given["outer"])


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape  # type: ignore[no-any-return]


def _matrices(
    name: str, value: torch.Tensor, words: bool, coded: Coded | str | None, low: LowRank | str | None
) -> Matrices:
    _, height, width = value.shape
    if isinstance(coded, Coded):
        return Matrices(name, height, width, (0, 0, 0), False, coded, low if isinstance(low, LowRank) else None)
    first, row, column = value.stride()
    return Matrices(name, height, width, (first, row, column), words)
