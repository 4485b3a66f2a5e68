"""Quantize weights and activations: `quantize`.

Before                                  after  quantize{weights=int4:g64,activations=int8:token}
    y = linear(x, W, b)                     q, s = quantize(x)                       one scale a token
                                            y = linear(dequantize(q, s), dequantize(pack(Wq), Ws, Wz), b)

`weights`       a number format (below) with a scale an output channel, `:gN` for groups of N input channels, `:bN` for
                blocks of N × N, `:tensor` for the whole weight; integers also `:sym`/`:asym`, those of 4 bits and less
                being asymmetric unless said otherwise. Rounded to nearest; `:mse` takes the range, group by group, that
                costs the least error.
`activations`   inputs of the products, rounded at run time: a number format with a scale a token, `:gN` or `:tensor`;
                symmetric unless an integer has `:asym`.
`keys`, `values`  the same for what attention reads, one scale a head and token. Each token's codes depend on that token
                alone, as in a cache of them; keys and values that come from a cache are refused.
`only`, `skip`  module paths to take or to leave, with `*`, separated by `|`: `only=*.mlp.*|*.o_proj`.

Formats: `int8` … `int2`; `fp8` (e4m3), `e5m2`, `fp6` (e3m2), `fp4` (e2m1), and any ExMy of 3 to 8 bits, with a real
number as its exponent's bias in each group; `mxfp8`, `mxfp6`, `mxfp4` (blocks of 32, a power of two as their scale),
`nvfp4` (blocks of 16, E4M3 scales and one for the tensor, of activations for the token); `ternary`, `binary`. Codes are
packed without unused bits. Kernels read int8 and int4 weights; those of other formats are expanded before each product
(`fuseline.decode`), which saves memory, not time. A NaN or an infinity in a weight makes NaN of all that shares its
scale, and so it does in activations, but for integers with a scale a token or group.

Every linear whose weight is a parameter is a site, and so is a product with a parameter of the transposed layout
(`addmm`, `mm`) and a convolution (`conv1d`, `conv2d`, `conv3d`): its kernel is the matrix [out, in · positions], and
`activations` refuses it. Refused too are experts stacked in one tensor, recurrent layers and transposed convolutions.
The head, a linear over the vocabulary of an embedding of the same program, is quantized only when `only` names it, and
so are embeddings. Codes, scales and zero points are weight expressions: computed once, shared by all graphs of the
model, again when the parameter changes.

Lossy. Sources: ZeroQuant (Yao et al., 2022), group-wise weights and token-wise activations; LLM-QAT (Liu et al., 2023),
token-wise keys and values; LLM-FP4 (Liu et al., 2023), real biases; OCP Microscaling Formats 1.0; BitNet b1.58 (Ma et
al., 2024), ternary; XNOR-Net (Rastegari et al., 2016), binary.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..compiler.errors import UserError
from ..compiler.expressions import Expression, Param
from ..compiler.framework import Pass, Tier
from ..compiler.program import Program
from ..compiler.registry import register
from ..compiler.rewriter import Builder, Rewriter
from ..compiler.schemes import Scheme
from .quantize_attention import rounded_attention
from .quantize_sites import Site, heads, out_of_reach, path_of, sites
from .quantize_values import round_trip, rounded_weight

aten = torch.ops.aten


@register
@dataclass(frozen=True)
class Quantize(Pass):
    """Weights, activations, keys and values in few bits, rounded to nearest."""

    name = "quantize"
    tier = Tier.LOSSY
    example = "quantize{weights=int8}"

    weights: str | None = None  # a format, with :gN, :bN, :tensor, :sym, :asym, :mse
    activations: str | None = None  # a format, with :gN, :tensor, :sym, :asym
    keys: str | None = None  # the same, of attention
    values: str | None = None  # the same, of attention
    only: tuple[str, ...] = ()  # module paths to take
    skip: tuple[str, ...] = ()  # module paths to leave

    def __post_init__(self) -> None:
        if not any(self.asked().values()):
            raise UserError(
                "pass 'quantize' needs to be told what to quantize",
                remedy="quantize{weights=int8}, quantize{weights=int4:g64} or quantize{weights=int8,activations=int8}",
            )
        self.schemes()

    def asked(self) -> dict[str, str | None]:
        """The schemes' texts."""
        return {name: getattr(self, name) for name in ("weights", "activations", "keys", "values")}

    def schemes(self) -> dict[str, Scheme | None]:
        """The schemes of weights, activations, keys and values."""
        found = {name: Scheme.parse(t, weights=name == "weights") if t else None for name, t in self.asked().items()}
        for name in ("keys", "values"):
            if (scheme := found[name]) and scheme.rows != 1:
                raise UserError(
                    f"'{name}={getattr(self, name)}': one scale for all tokens would change the codes of those before",
                    remedy=f"{name}={scheme.format}:token",
                )
        return found

    def run(self, program: Program, rewriter: Rewriter) -> None:
        schemes = self.schemes()
        weights, activations = schemes["weights"], schemes["activations"]
        if weights or activations:
            self._products(program, rewriter, weights, activations)
        for node in list(program.graph.nodes):
            if node.target is aten.embedding.default and self._names(path_of(node.args[0])) and weights:
                self._embedding(program, rewriter, node, weights)
        if schemes["keys"] or schemes["values"]:
            rounded_attention(program, rewriter, schemes["keys"], schemes["values"], self._left_out)

    def _products(
        self, program: Program, rewriter: Rewriter, weights: Scheme | None, activations: Scheme | None
    ) -> None:
        quantized_inputs: dict[Node, Node] = {}
        over_vocabulary = heads(program)
        for node, path, why in out_of_reach(program) if weights else ():
            if not self._left_out(path):
                rewriter.refuse(node, why)
        for site in sites(program):  # found one by one: a rewrite changes what the next one reads
            reason = self._refuse(program, site, weights, activations, site.node in over_vocabulary)
            if reason is None:
                rewriter.rewrite(
                    site.node,
                    [site.node],
                    lambda new, site=site: _quantized(new, site, weights, activations, quantized_inputs),  # type: ignore[misc]
                    "convolution" if site.kernel else "linear",
                )
            elif reason:
                rewriter.refuse(site.node, reason)

    def _embedding(self, program: Program, rewriter: Rewriter, node: Node, scheme: Scheme) -> None:
        """Gathers codes and scales by row, then dequantizes the gathered rows only."""
        table, indices = node.args[:2]
        expression = table.meta.get("weight") if isinstance(table, Node) else None
        if not isinstance(expression, Param):
            rewriter.refuse(node, "the embedding's table is computed, not a parameter")
            return
        rows, channels = (int(s) for s in table.meta["val"].shape)  # type: ignore[union-attr]
        reason = scheme.refuse(channels, rows) or _needs_gradient(program, expression)
        if reason:
            rewriter.refuse(node, reason)
            return

        def build(new: Builder) -> Node:
            gathered = lambda part: new(aten.embedding.default, part, indices)
            return rounded_weight(new, expression, scheme, channels, node.meta["val"].dtype, gathered)

        rewriter.rewrite(node, [node], build, "embedding")

    def _names(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.only)

    def _left_out(self, path: str) -> bool:
        skipped = any(fnmatch.fnmatchcase(path, pattern) for pattern in self.skip)
        return skipped or bool(self.only and not self._names(path))

    def _refuse(
        self, program: Program, site: Site, weights: Scheme | None, activations: Scheme | None, head: bool
    ) -> str | None:
        """A reason; "" for a site that the options leave out without a word; None to go ahead."""
        if self._left_out(site.path):
            return ""
        if head and not self._names(site.path):
            return f"the model's head over its vocabulary: name it to quantize it, only={site.path}"
        if not site.node.meta["val"].dtype.is_floating_point:
            return f"its result is {site.node.meta['val'].dtype}, not a floating-point type"
        if activations and site.kernel:
            return "a convolution's input has no tokens to share a scale: leave the convolutions out, skip=…"
        reason = weights.refuse(site.shape[1], site.shape[0]) if weights else None
        reason = reason or (activations.refuse_group(site.shape[1]) if activations else None)
        return reason or _needs_gradient(program, site.weight)

    def nothing_matched(self, program: Program) -> tuple[str, ...]:
        found = list(sites(program))
        asked = ", ".join(f"{k}={v}" for k, v in self.asked().items() if v)
        if not (self.weights or self.activations):
            return (f"asked for: {asked}; no attention was found that makes its own", "does `raise` run before?")
        if not found:
            return (f"asked for: {asked}; the program has no product with a parameter",)
        closest = found[0]
        return (f"asked for: {asked} on {len(found)} linears, such as {closest.path} ({closest.shape[1]} inputs)",)

    def remedy(self, program: Program) -> str | None:
        weights = self.schemes()["weights"]
        widths = [site.shape[1] for site in sites(program)]
        if weights is None or not weights.group or not widths or any(w % weights.group == 0 for w in widths):
            return None
        common = weights.fitting(math.gcd(*widths))
        if not common or weights.rows != 1:
            return None
        if weights.of.group:  # its own numbers, in other groups
            return str(replace(self, weights=f"{weights.of.element.name}:g{common[0]}"))
        return str(replace(self, weights=f"{self.weights}".replace(f"g{weights.group}", f"g{common[0]}")))


def _needs_gradient(program: Program, weight: Expression) -> str | None:
    if program.training and any(program.sources[n].trainable for n in weight.parameters()):
        return (
            "its weight wants a gradient, and rounding has none: freeze it (requires_grad_(False)) or compile under "
            "torch.no_grad()"
        )
    return None


def _quantized(
    new: Builder, site: Site, weights: Scheme | None, activations: Scheme | None, inputs: dict[Node, Node]
) -> Node:
    x, (_, channels) = site.x, site.shape
    dtype = x.meta["val"].dtype
    if activations is not None:
        if x not in inputs:
            inputs[x] = round_trip(new, x, activations)
        x = inputs[x]
    if weights is not None:
        table = rounded_weight(new, site.weight, weights, channels, dtype)
    else:
        table = new.weight(site.weight)
    if site.kernel is not None:
        return _convolution(new, site, table)
    if site.bias is not None and site.bias.meta["val"].dim() != 1:  # `addmm` adds anything that broadcasts
        return new(aten.add.Tensor, new(aten.linear.default, x, table, None), site.bias)
    return new(aten.linear.default, x, table, site.bias)


def _convolution(new: Builder, site: Site, matrix: Node) -> Node:
    """The same call on the matrix folded back to [out, in / groups, *kernel], in the memory format that it had."""
    before = site.node.args[1].meta["val"]  # type: ignore[union-attr]
    table = new(aten.view.default, matrix, list(site.kernel))  # type: ignore[arg-type]
    for layout in (torch.channels_last, torch.channels_last_3d):
        if before.dim() == (4 if layout is torch.channels_last else 5) and not before.is_contiguous():
            if before.is_contiguous(memory_format=layout):
                table = new(aten.clone.default, table, memory_format=layout)
    return new(site.node.target, site.x, table, *site.node.args[2:], **site.node.kwargs)
