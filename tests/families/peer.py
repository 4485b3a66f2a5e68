"""The KL divergence of `quantize{weights=int8}` beside torchao's int8 weight-only quantization of the same weights.

    pip install --no-deps --target DIRECTORY torchao && PYTHONPATH=DIRECTORY python -m tests.families

Both round to nearest, one scale an output channel; torchao divides the largest weight by 127.5 where we divide by 127,
so that the two divergences of one model differ by chance, by 10% and more. Compared is therefore the geometric mean of
their ratio over many draws of weights and inputs, with its standard error. The compiled model is the same for all
draws: its weights are changed in place, and it notices. Mixtures route every token to every expert here: otherwise the
few tokens whose experts change outweigh all others, and chance decides which of the two has fewer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fuseline
from fuseline.compiler.expressions import Pack, Transpose

from .measure import PASSES, divergence
from .rows import Row, draw

BATCH = 16


@dataclass(frozen=True)
class Comparison:
    """Over `draws`: the mean nats of both, the geometric mean of ours over torchao's, and its standard error."""

    kl: float
    torchao: float
    ratio: float
    deviation: float
    draws: int


@torch.no_grad()
def compare(row: Row, least: int = 32, enough: int = 96, most: int = 1024, precision: float = 0.01) -> Comparison:
    """Draws weights and inputs until the ratio is known to `precision`, after `enough` draws to three times that, or
    `most` times."""
    torch.compiler.reset()
    original, ours = row.model(smooth=True), row.model(smooth=True)
    fuseline.optimize(ours, PASSES["int8"])
    ours(**row.inputs(BATCH, 1))
    names = quantized(ours)
    if not names:
        raise ValueError(f"{row.name}: nothing was quantized")
    pairs: list[tuple[float, float]] = []
    while True:
        seed = len(pairs)
        draw(original, seed)
        draw(ours, seed)
        inputs = row.inputs(BATCH, seed + 1)
        reference = row.logits(original(**inputs))
        peer = torchao_quantized(copy.deepcopy(original), names)
        pairs.append(
            (
                divergence(reference, row.logits(ours(**inputs))),
                divergence(reference, row.logits(peer(**inputs))),
            )
        )
        if len(pairs) < least:
            continue
        mine, theirs = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        logarithm = (mine / theirs).log()
        ratio = logarithm.mean().exp().item()
        deviation = ratio * logarithm.std().item() / len(pairs) ** 0.5
        wanted = precision if len(pairs) < enough else 3 * precision
        if deviation <= wanted or len(pairs) == most:
            return Comparison(mine.mean().item(), theirs.mean().item(), ratio, deviation, len(pairs))


def quantized(model: nn.Module) -> dict[str, bool]:
    """The parameters that any graph of a model reads as codes, and whether each is kept transposed.

    By identity, from what was bound in the calls so far: modules that are alike share a graph, in which only the first
    one's parameters have a name.
    """
    of_tensor = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, bool] = {}
    for compilation in fuseline.reports(model):
        program, binder = compilation.program, compilation.executable.binder
        packed = [n.meta["weight"] for n in program.weights() if isinstance(n.meta["weight"], Pack)]
        transposed = {
            program.sources[e.parameters()[0]].index: any(isinstance(below, Transpose) for below in e.walk())
            for e in packed
        }
        for bound in binder.bound.values():
            for index, parameter in zip(binder.watched, bound.sources, strict=False):  # memory comes behind
                if index in transposed:
                    found[of_tensor[id(parameter())]] = transposed[index]
    return found


def torchao_quantized(model: nn.Module, names: dict[str, bool]) -> nn.Module:
    """The same parameters in torchao's int8: `quantize_` for linears, its tensor's own values for the others."""
    from torchao.quantization import Int8WeightOnlyConfig, PerRow, quantize_
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    others = dict(names)
    # not those that a fused op reads the weight of: torchao's tensor does not go through it
    linears = {n for n, m in model.named_modules() if type(m) is nn.Linear and f"{n}.weight" in names}
    for name in linears:
        del others[f"{name}.weight"]
    parameters = dict(model.named_parameters())
    for name, transposed in others.items():
        weight = parameters[name].detach()
        matrix = weight.t() if transposed else weight.flatten(1)
        rounded = Int8Tensor.from_hp(matrix.contiguous(), PerRow()).dequantize()
        weight.copy_(rounded.t() if transposed else rounded.view_as(weight))
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda module, name: name in linears)
    return model


def record(comparison: Comparison) -> dict[str, Any]:
    """What the table keeps: figures to four digits."""
    digits = lambda value: float(f"{value:.4g}")
    return {
        "kl": digits(comparison.kl), "torchao": digits(comparison.torchao), "ratio": round(comparison.ratio, 4),
        "deviation": round(comparison.deviation, 4), "draws": comparison.draws,
    }  # fmt: skip
