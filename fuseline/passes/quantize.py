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
`keys`, `values`  the same for those that a call makes for attention, one scale a head and token, before they go into a
                cache, which holds them rounded. Each token's codes depend on that token alone: step by step is as all
                at once. The cache itself keeps its type.
`method`        how codes are chosen; all but rtn and hqq need calibration data (docs/calibration.md):
                rtn     to the nearest code
                hqq     ranges fitted to Σ|error|^0.7, with no data
                gptq    column by column, each making up for what those before it lost, by what the site reads in this
                        very program; `static` takes scales from the weight as it was, `order` rounds the columns
                        that matter most first (it needs `static`), `damp` is the share of the Hessian's mean diagonal
                        that is added to it, `offload` keeps the values between layers on the CPU
                awq     to nearest, input channels scaled up first by |x|^α, α searched; scaled back where x is made
                smooth  the same with max|x|^α / max|w|^(1−α), `alpha` given, for activations that are rounded
`only`, `skip`  module paths to take or to leave, with `*`, separated by `|`: `only=*.mlp.*|*.o_proj`.

Formats: `int8` … `int2`; `fp8` (e4m3), `e5m2`, `fp6` (e3m2), `fp4` (e2m1), and any ExMy of 3 to 8 bits, with a real
number as its exponent's bias in each group; `mxfp8`, `mxfp6`, `mxfp4` (blocks of 32, a power of two as their scale),
`nvfp4` (blocks of 16, E4M3 scales and one for the tensor, of activations for the token); `ternary`, `binary`. Codes are
packed without unused bits. Kernels read int8 and int4 weights; those of other formats are expanded before each product
(`fuseline.decode`), which saves memory, not time. A NaN or an infinity in a weight makes NaN of all that shares its
scale, and so it does in activations, but for integers with a scale a token or group.

Behind `rsparse` codes lie along the outputs, in groups of those, so that a channel left out is bytes left out.

Every linear whose weight is a parameter is a site, and so is a product with a parameter of the transposed layout
(`addmm`, `mm`) and a convolution (`conv1d`, `conv2d`, `conv3d`): its kernel is the matrix [out, in · positions], and
`activations` refuses it. Refused too are experts stacked in one tensor, recurrent layers and transposed convolutions.
The head, a linear over the vocabulary of an embedding of the same program, is quantized only when `only` names it, and
so are embeddings. Codes, scales and zero points are weight expressions: computed once, shared by all graphs of the
model, again when the parameter changes; those that gptq chose are the plan's, and refused for another weight.

awq and smooth scale where it is exact: in the scale of a norm, or the rows of a product, whose result nothing else
reads; everywhere else the site is rounded as it is, with the reason. A weight of several uses is refused by gptq.

Lossy. Sources: ZeroQuant (Yao et al., 2022), group-wise weights and token-wise activations; LLM-QAT (Liu et al., 2023),
token-wise keys and values; HQQ (Badri and Shaji, 2023); GPTQ (Frantar et al., 2023); AWQ (Lin et al., 2024);
SmoothQuant (Xiao et al., 2023); LLM-FP4 (Liu et al., 2023), real biases; OCP Microscaling Formats 1.0; BitNet b1.58 (Ma
et al., 2024), ternary; XNOR-Net (Rastegari et al., 2016), binary.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..compiler import ops
from ..compiler.errors import UserError
from ..compiler.expressions import Decided, Expression, HalfQuadratic, Param, Planned
from ..compiler.expressions import Quantize as QuantizeExpression
from ..compiler.framework import Findings, Pass, Study, Tier
from ..compiler.plan import SitePlan
from ..compiler.program import Program
from ..compiler.registry import register
from ..compiler.rewriter import Builder, Rewriter
from ..compiler.schemes import Scheme
from .calibrated import CALIBRATED, Method, check_options, decide, findings, fold_scales
from .quantize_attention import rounded_attention
from .quantize_sites import Site, heads, out_of_reach, path_of, sites
from .quantize_values import round_trip, rounded_weight

aten = torch.ops.aten
Codes = Callable[[Site], Expression | None]
"""The expression whose outputs are a site's codes, scales and zero points; None to leave the site, which is refused."""


@register
@dataclass(frozen=True)
class Quantize(Pass):
    """Weights, activations, keys and values in few bits."""

    name = "quantize"
    tier = Tier.LOSSY
    example = "quantize{weights=int8}"

    weights: str | None = None  # a format, with :gN, :bN, :tensor, :sym, :asym, :mse
    activations: str | None = None  # a format, with :gN, :tensor, :sym, :asym
    keys: str | None = None  # the same, of attention
    values: str | None = None  # the same, of attention
    only: tuple[str, ...] = ()  # module paths to take
    skip: tuple[str, ...] = ()  # module paths to leave
    method: Method = Method.RTN  # how codes are chosen
    static: bool = False  # gptq: scales of the weight as it was
    order: bool = False  # gptq: the columns that matter most first
    damp: float = 0.01  # gptq: share of the mean diagonal that is added to the Hessian
    offload: bool = False  # gptq, awq, smooth: values between layers on the CPU
    alpha: float = 0.5  # smooth: how much of the range goes from activations to weights

    def __post_init__(self) -> None:
        if not any(self.asked().values()):
            raise UserError(
                "pass 'quantize' needs to be told what to quantize",
                remedy="quantize{weights=int8}, quantize{weights=int4:g64} or quantize{weights=int8,activations=int8}",
            )
        self.schemes()
        check_options(self)

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether the method decides from data."""
        return self.method in CALIBRATED

    def decide(self, study: Study) -> dict[str, SitePlan]:
        return decide(self, study)

    def without_data(self) -> Quantize | None:
        """Rounding to nearest. Where activations are rounded too, weights are left: what calibration makes up for is
        not what an earlier pass should be chosen by (SpinQuant, Liu et al., 2024)."""
        if not self.needs_data:
            return self
        weights = None if self.activations and self.method is Method.GPTQ else self.weights
        return Quantize(weights, self.activations, self.keys, self.values, self.only, self.skip, allow_empty=True)

    def findings(self, decisions: Mapping[str, SitePlan]) -> Findings:
        return findings(decisions)

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
        if self.method in (Method.AWQ, Method.SMOOTH):
            fold_scales(self, program, rewriter)
        weights = self.schemes()["weights"]
        self.apply(program, rewriter, None if weights is None else lambda site: self._codes(rewriter, site, weights))

    def apply(self, program: Program, rewriter: Rewriter, codes: Codes | None) -> None:
        """Rounds all that this pass names, the weights of products by `codes`; None leaves those as they are."""
        schemes = self.schemes()
        weights, activations = schemes["weights"], schemes["activations"]
        if codes or activations:
            self._products(program, rewriter, codes, activations)
        for node in list(program.graph.nodes):
            if node.target is aten.embedding.default and self._names(path_of(node.args[0])) and weights:
                self._embedding(program, rewriter, node, weights)
        if schemes["keys"] or schemes["values"]:
            rounded_attention(program, rewriter, schemes["keys"], schemes["values"], self._left_out)

    def admitted(self, program: Program) -> Iterator[Site]:
        """The sites that are rounded."""
        over_vocabulary = heads(program)
        for site in sites(program):
            if self._refuse(program, site, site.node in over_vocabulary) is None:
                yield site

    def _codes(self, rewriter: Rewriter, site: Site, scheme: Scheme) -> Expression | None:
        if self.method is Method.HQQ:
            return HalfQuadratic(site.weight, scheme)
        if self.method is not Method.GPTQ:
            return QuantizeExpression(site.weight, scheme)
        decision = rewriter.decision(site.node)
        if decision is None or "reason" in decision.structure:
            if decision is not None:
                rewriter.refuse(site.node, decision.structure["reason"])
            return None
        device = str(site.node.meta["val"].device)
        found = {name: Planned.of(tensor, device) for name, tensor in decision.tensors.items()}
        one, other = decision.structure["probe"]
        return Decided(site.weight, found["codes"], found["scale"], found.get("zero"), (one, other))

    def _products(self, program: Program, rewriter: Rewriter, codes: Codes | None, activations: Scheme | None) -> None:
        weights = self.schemes()["weights"]
        quantized_inputs: dict[Node, Node] = {}
        over_vocabulary = heads(program)
        for node, path, why in out_of_reach(program) if weights else ():
            if not self._left_out(path):
                rewriter.refuse(node, why)
        for site in sites(program):  # found one by one: a rewrite changes what the next one reads
            reason = self._refuse(program, site, site.node in over_vocabulary)
            chosen = codes(site) if codes is not None and reason is None else None
            if reason is None and (chosen is not None or codes is None):
                rewriter.rewrite(
                    site.node,
                    [site.node],
                    lambda new, site=site, chosen=chosen: _quantized(  # type: ignore[misc]
                        new, site, chosen, weights, activations, quantized_inputs
                    ),
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
            codes = QuantizeExpression(expression, scheme)
            return rounded_weight(new, codes, scheme, channels, node.meta["val"].dtype, gathered)

        rewriter.rewrite(node, [node], build, "embedding")

    def _names(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.only)

    def _left_out(self, path: str) -> bool:
        skipped = any(fnmatch.fnmatchcase(path, pattern) for pattern in self.skip)
        return skipped or bool(self.only and not self._names(path))

    def _refuse(self, program: Program, site: Site, head: bool) -> str | None:
        """A reason; "" for a site that the options leave out without a word; None to go ahead."""
        if self._left_out(site.path):
            return ""
        schemes = self.schemes()
        weights, activations = schemes["weights"], schemes["activations"]
        if head and not self._names(site.path):
            return f"the model's head over its vocabulary: name it to quantize it, only={site.path}"
        if not site.node.meta["val"].dtype.is_floating_point:
            return f"its result is {site.node.meta['val'].dtype}, not a floating-point type"
        if activations and site.kernel:
            return "a convolution's input has no tokens to share a scale: leave the convolutions out, skip=…"
        if site.is_sparse and self.needs_data:
            return (
                f"method={self.method.value} decides along the inputs, and the codes of a sparse product lie along its "
                "outputs: method=rtn or method=hqq"
            )
        reason = weights.refuse(site.shape[1], site.shape[0]) if weights else None
        inputs = site.shape[0] if site.is_sparse else site.shape[1]
        reason = reason or (activations.refuse_group(inputs) if activations else None)
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
    new: Builder,
    site: Site,
    codes: Expression | None,
    weights: Scheme | None,
    activations: Scheme | None,
    inputs: dict[Node, Node],
) -> Node:
    x, (_, channels) = site.x, site.shape  # along which codes lie
    dtype = x.meta["val"].dtype
    if activations is not None:
        if x not in inputs:
            inputs[x] = round_trip(new, x, activations)
        x = inputs[x]
    if codes is not None and weights is not None:
        table = rounded_weight(new, codes, weights, channels, dtype)
    else:
        table = new.weight(site.weight)
    if site.kernel is not None:
        return _convolution(new, site, table)
    if site.is_sparse:
        return new(ops.sparse_linear, x, table, *site.node.args[2:])
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
