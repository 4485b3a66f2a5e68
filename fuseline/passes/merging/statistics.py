"""What a layer's experts do on calibration data: how often they are chosen, what they read, and what they return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Interpreter, Node

from ...compiler.errors import UserError
from ...compiler.ops._grouped import Rows
from ...compiler.ops.moe import gated, projected
from ...compiler.program import Program
from ...compiler.progress import steps
from .layers import Layer, stacked

SAMPLE = 256
"""Tokens of a layer that go through all of its experts, to tell how alike these are."""


@dataclass
class Statistics:
    """Of one layer, over the calibration data; all on the CPU in float32.

    tokens: routed tokens by expert, [E]; gates: the sum of their weights, [E]; reap: the mean over an expert's tokens
    of weight · ‖output‖, [E]; inputs: ‖x_j‖ over its tokens, [E, H]; inner: the same of what `down` reads, [E, I];
    outputs: the mean of each expert's outputs on a sample of all tokens, [E, H]; seen: tokens in all.
    """

    tokens: torch.Tensor
    gates: torch.Tensor
    reap: torch.Tensor
    inputs: torch.Tensor
    inner: torch.Tensor
    outputs: torch.Tensor
    seen: int = 0

    @staticmethod
    def empty(layer: Layer) -> Statistics:
        e = layer.experts
        shapes = (e,), (e,), (e,), (e, layer.hidden), (e, layer.inner), (e, layer.hidden)
        return Statistics(*(torch.zeros(shape) for shape in shapes))

    @property
    def frequency(self) -> torch.Tensor:
        """Each expert's share of all choices, [E]."""
        return self.tokens / self.tokens.sum().clamp_min(1)


@torch.no_grad()
def statistics(program: Program, layers: Sequence[Layer], data: Sequence[Sequence[Any]]) -> dict[Layer, Statistics]:
    """One run of the program for each batch of data.

    Raises:
        UserError: there is no data, or an expert's output is no finite number.
    """
    if not data:
        raise UserError("calibration holds no batch", remedy="calibration=[(input_ids,), …]")
    watching = _Watching(program, layers, len(data))
    for flat in steps(data, "watching experts", total=len(data)):
        watching(flat)
    for layer, found in watching.found.items():
        found.reap /= found.tokens.clamp_min(1)
        found.inputs.sqrt_()
        found.inner.sqrt_()
        found.outputs /= max(1, watching.sampled[layer])
        if not all(bool(x.isfinite().all()) for x in (found.reap, found.inputs, found.inner, found.outputs)):
            raise UserError(
                f"an expert of {layer.path} returns an infinite value or no number on the calibration data",
                remedy="look for it with fuseline run MODEL --verify, or calibrate in float32",
            )
    return watching.found


class _Watching(Interpreter):
    def __init__(self, program: Program, layers: Sequence[Layer], batches: int):
        super().__init__(program.module)
        self.program, self.layers = program, {layer.node: layer for layer in layers}
        self.found = {layer: Statistics.empty(layer) for layer in layers}
        self.sampled = dict.fromkeys(layers, 0)
        self.each = -(-SAMPLE // batches)
        self.flat: Sequence[Any] = ()

    def __call__(self, flat: Sequence[Any]) -> None:
        self.flat = flat
        self.run(*[flat[i] for i in self.program.arguments])

    def parameter(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self.flat[self.program.sources[name].index].detach()
        return found

    def run_node(self, node: Node) -> Any:
        if node.op == "get_attr" and "weight" in node.meta:
            return node.meta["weight"].evaluate(self.parameter)
        result = super().run_node(node)
        if node in self.layers:
            args, _ = self.fetch_args_kwargs_from_env(node)
            self._watch(self.layers[node], *args)
        return result

    def _watch(self, layer: Layer, hidden: Any, indices: Any, weights: Any, *_: Any) -> None:
        found, rows = self.found[layer], Rows(indices, layer.experts)
        x, inner, y = _forward(layer, self.parameter, hidden[rows.tokens], rows)
        gate, ids = weights.reshape(-1)[rows.order].float(), rows.experts
        found.seen += len(hidden)
        sums = ((found.tokens, torch.ones_like(gate)), (found.gates, gate), (found.reap, gate * y.float().norm(dim=-1)),
                (found.inputs, x.float().square()), (found.inner, inner.float().square()))  # fmt: skip
        for total, value in sums:
            total += torch.zeros_like(total, device=value.device).index_add_(0, ids, value).cpu()
        take = min(self.each, len(hidden))
        sample = hidden[torch.arange(take, device=hidden.device) * len(hidden) // take]
        every = torch.arange(layer.experts, device=hidden.device).expand(take, -1)
        rows = Rows(every, layer.experts)
        outputs = rows.back(_forward(layer, self.parameter, sample[rows.tokens], rows)[2])
        found.outputs += outputs.float().sum(0).cpu()
        self.sampled[layer] += take


def _forward(layer: Layer, lookup: Any, x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What experts read, what their `down` reads, and what they return, a row a pair."""
    given = layer.given
    gate_up, down = stacked(layer, lookup)
    biases = [None if bias is None else bias.evaluate(lookup) for bias in layer.biases]
    both = projected(x, gate_up, biases[0], rows)
    inner = gated(both, given["activation"], given["interleaved"], given["alpha"], given["limit"])
    return x, inner, projected(inner, down, biases[1], rows)
