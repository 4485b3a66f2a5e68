"""What a region of routed experts is made of: sizes, types, and how the experts' matrices lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ....compiler.ops import find
from ....compiler.ops.moe import CLAMPED
from ....compiler.traits import arguments
from ...formulas import ACTIVATIONS
from ...kernel import Refusal

COMPUTED = (torch.float32, torch.float16, torch.bfloat16)
TENSORS = ("hidden", "indices", "weights", "gate_up", "down", "rows", "slots", "gate_up_bias", "down_bias")


@dataclass(frozen=True)
class Matrices:
    """One matrix an expert (or a pair), [count, height, width]; `strides` are those of its three dimensions.

    words: two 16-bit words of a row of a pair lie in one int32, as the kernels load them.
    """

    name: str
    height: int
    width: int
    strides: tuple[int, int, int]
    words: bool

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
        return self.gate_up.words

    @property
    def tensors(self) -> dict[str, Node]:
        """The op's tensors: argument → placeholder."""
        return {name: self.given[name] for name in TENSORS if isinstance(self.given.get(name), Node)}

    @property
    def gate_step(self) -> tuple[int, int]:
        """Between the rows of neighbouring gates, and between a gate's and its up's, in rows of gate_up."""
        return (2, 1) if self.given["interleaved"] else (1, self.inner)

    @property
    def title(self) -> str:
        """The first line of the kernels' headings."""
        kind = "pairs of" if self.pairs else str(self.gate_up_dtype).removeprefix("torch.")
        return f"{self.top} of {self.experts} experts, {kind} {self.hidden} x {self.inner}, {self.given['activation']}"

    @property
    def gate_up_dtype(self) -> torch.dtype:
        return self.given["gate_up"].meta["val"].dtype  # type: ignore[no-any-return]

    @property
    def expert_bytes(self) -> int:
        """Of one expert's matrices, or of one pair's."""
        itemsize: int = self.gate_up_dtype.itemsize
        return 3 * self.hidden * self.inner * itemsize


def read(region: GraphModule) -> Experts | Refusal:
    """A region's experts, or why the template does not serve them."""
    calls = [n for n in region.graph.nodes if n.op == "call_function"]
    op = find(calls[0].target) if len(calls) == 1 else None
    if op is None or op.name not in ("moe", "moe_pairs"):
        return Refusal("the region is not one call of routed experts")
    node, given, pairs = calls[0], arguments(calls[0]), op.name == "moe_pairs"
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
    refused = _pairs(value) if pairs else _plain(value)
    if refused:
        return Refusal(refused)
    matrices = [_matrices(name, value[name], pairs) for name in ("gate_up", "down")]
    experts = value["rows"].shape[0] if pairs else value["gate_up"].shape[0]
    placeholders = tuple(n for n in region.graph.nodes if n.op == "placeholder")
    return Experts(
        node, given, placeholders, hidden, twice // 2, experts, top, value["gate_up"].shape[0], dtype, *matrices
    )


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


def _matrices(name: str, value: torch.Tensor, words: bool) -> Matrices:
    _, height, width = value.shape
    first, row, column = value.stride()
    if words:
        return Matrices(name, height, width, (first // 2, row // 2, 1), True)
    return Matrices(name, height, width, (first, row, column), False)
