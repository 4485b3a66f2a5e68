"""Quantize weights and activations: `quantize`.

Before                                  after  quantize{weights=int4:g64,activations=int8:token}
    y = linear(x, W, b)                     q, s = quantize(x)                       one scale a token
                                            y = linear(dequantize(q, s), dequantize(pack(Wq), Ws, Wz), b)

`weights`       a number format (below) with a scale an output channel, `:gN` for groups of N input channels, `:bN` for
                blocks of N × N, `:tensor` for the whole weight; integers also `:sym`/`:asym`, those of 4 bits and less
                being asymmetric unless said otherwise. Rounded to nearest; `:mse` takes the range, group by group, that
                costs the least error.
`activations`   inputs of the products, rounded at run time: a number format with a scale a token, `:gN` or `:tensor`;
                symmetric unless an integer has `:asym`. `int2:thresholds` … `int4:thresholds`: between thresholds that
                training places, for all tokens (docs/qat.md).
`keys`, `values`  the same for those that a call makes for attention, one scale a head and token, before they go into a
                cache, which holds them rounded. Each token's codes depend on that token alone: step by step is as all
                at once. The cache itself keeps its type.
`method`        how codes are chosen; gptq, awq and smooth need calibration data (docs/calibration.md), paretoq and parq
                training (docs/qat.md):
                rtn     to the nearest code
                hqq     ranges fitted to Σ|error|^0.7, with no data
                gptq    column by column, each making up for what those before it lost, by what the site reads in this
                        very program; `static` takes scales from the weight as it was, `order` rounds the columns
                        that matter most first (it needs `static`), `damp` is the share of the Hessian's mean diagonal
                        that is added to it, `offload` keeps the values between layers on the CPU
                awq     to nearest, input channels scaled up first by |x|^α, α searched; scaled back where x is made
                smooth  the same with max|x|^α / max|w|^(1−α), `alpha` given, for activations that are rounded
                paretoq ranges that training learns, with the weights
                parq    to nearest on a grid that the optimizer has drawn the weights to
`only`, `skip`  module paths to take or to leave, with `*`, separated by `|`: `only=*.mlp.*|*.o_proj`.

Formats: `int8` … `int2`; `fp8` (e4m3), `e5m2`, `fp6` (e3m2), `fp4` (e2m1), and any ExMy of 3 to 8 bits, with a real
number as its exponent's bias in each group; `mxfp8`, `mxfp6`, `mxfp4` (blocks of 32, a power of two as their scale),
`nvfp4` (blocks of 16, E4M3 scales and one for the tensor, of activations for the token); `ternary`, `binary`, and
`midrise4` … `midrise2`, half-way between whole numbers (±½, ±1½, …). Codes are packed without unused bits. Kernels read
int8 and int4 weights; those of other formats are expanded before each product (`fuseline.decode`), which saves memory,
not time. A NaN or an infinity in a weight makes NaN of all that shares its scale, and so it does in activations, but
for integers with a scale a token or group.

Every linear whose weight is a parameter is a site, and so is a product with a parameter of the transposed layout
(`addmm`, `mm`) and a convolution (`conv1d`, `conv2d`, `conv3d`): its kernel is the matrix [out, in · positions], and
`activations` refuses it. Refused too are experts stacked in one tensor, recurrent layers and transposed convolutions.
The head, a linear over the vocabulary of an embedding of the same program, is quantized only when `only` names it, and
so are embeddings. Codes, scales and zero points are weight expressions: computed once, shared by all graphs of the
model, again when the parameter changes; those that gptq chose are the plan's, and refused for another weight.

Under autograd what gradients pass through is refused: rounding has none. In a program of `fuseline.prepare_qat` they
pass: weights, activations, keys and values are rounded by ops that have gradients (docs/qat.md).

awq and smooth scale where it is exact: in the scale of a norm, or the rows of a product, whose result nothing else
reads; everywhere else the site is rounded as it is, with the reason. A weight of several uses is refused by gptq.

Lossy. Sources: ZeroQuant (Yao et al., 2022), group-wise weights and token-wise activations; LLM-QAT (Liu et al., 2023),
token-wise keys and values; HQQ (Badri and Shaji, 2023); GPTQ (Frantar et al., 2023); AWQ (Lin et al., 2024);
SmoothQuant (Xiao et al., 2023); LLM-FP4 (Liu et al., 2023), real biases; OCP Microscaling Formats 1.0; BitNet b1.58 (Ma
et al., 2024), ternary; XNOR-Net (Rastegari et al., 2016), binary; ParetoQ (Liu et al., 2025) and PARQ (Jin et al.,
2025), training.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..compiler.errors import UserError
from ..compiler.expressions import Decided, Expression, HalfQuadratic, Param, Planned
from ..compiler.expressions import Quantize as QuantizeExpression
from ..compiler.framework import Findings, Pass, Study, Tier
from ..compiler.plan import SitePlan
from ..compiler.program import TRAINS, Program
from ..compiler.registry import register
from ..compiler.rewriter import Builder, Rewriter
from ..compiler.schemes import Scheme
from .calibrated import CALIBRATED, TRAINED, Method, check_options, decide, findings, fold_scales
from .quantize_attention import rounded_attention
from .quantize_products import quantized
from .quantize_sites import Site, heads, out_of_reach, path_of, sites
from .quantize_training import Trained, check_trained, needs_gradient, needs_training, record, trained_weight
from .quantize_values import rounded_weight

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
        schemes = self.schemes()
        check_options(self)
        if self.method in TRAINED:
            check_trained(self.method, schemes["weights"])

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether the method decides from data, or training does."""
        return self.method in CALIBRATED or self.is_trained

    @property
    def is_trained(self) -> bool:  # type: ignore[override]
        """Whether codes, or thresholds of activations, come out of training."""
        return self.method in TRAINED or self.learns_thresholds

    @property
    def learns_thresholds(self) -> bool:
        return bool(self.activations) and Scheme.parse(self.activations or "", weights=False).thresholds

    def decide(self, study: Study) -> dict[str, SitePlan]:
        return decide(self, study)

    def without_data(self) -> Quantize | None:
        """Rounding to nearest. Where activations are rounded too, weights are left: what calibration makes up for is
        not what an earlier pass should be chosen by (SpinQuant, Liu et al., 2024)."""
        if not self.needs_data:
            return self
        weights = None if self.activations and self.method is Method.GPTQ else self.weights
        activations = self.activations and self.activations.replace(":thresholds", "")
        return Quantize(weights, activations, self.keys, self.values, self.only, self.skip, allow_empty=True)

    def findings(self, decisions: Mapping[str, SitePlan]) -> Findings:
        return findings(decisions)

    def asked(self) -> dict[str, str | None]:
        """The schemes' texts."""
        return {name: getattr(self, name) for name in ("weights", "activations", "keys", "values")}

    def schemes(self) -> dict[str, Scheme | None]:
        """The schemes of weights, activations, keys and values."""
        found = {name: Scheme.parse(t, weights=name == "weights") if t else None for name, t in self.asked().items()}
        for name in ("keys", "values"):
            if (scheme := found[name]) and scheme.thresholds:
                raise UserError(f"'{name}={getattr(self, name)}': thresholds are learned for activations")
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
        if TRAINS in program.state and self.method not in (Method.RTN, *TRAINED):
            raise UserError(
                f"method={self.method.value} chooses codes once, and training changes the weights",
                remedy="method=paretoq, whose ranges are trained too, or method=rtn, which takes them at each step",
            )
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
            untrained = needs_training(program)
            rounded_attention(program, rewriter, schemes["keys"], schemes["values"], self._left_out, untrained)

    def admitted(self, program: Program) -> Iterator[Site]:
        """The sites that are rounded."""
        over_vocabulary = heads(program)
        for site in sites(program):
            if self._refuse(program, site, site.node in over_vocabulary) is None:
                yield site

    def _codes(self, rewriter: Rewriter, site: Site, scheme: Scheme) -> Expression | None:
        if TRAINS in rewriter.program.state:
            return site.weight
        if self.method is Method.HQQ:
            return HalfQuadratic(site.weight, scheme)
        if self.method not in (Method.GPTQ, *TRAINED):
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
                name = rewriter.site(site.node)
                done = rewriter.rewrite(
                    site.node,
                    [site.node],
                    lambda new, site=site, chosen=chosen, name=name: quantized(  # type: ignore[misc]
                        new, site, chosen, self, quantized_inputs, name, rewriter.decisions.get(name)
                    ),
                    "convolution" if site.kernel else "linear",
                )
                if done and weights is not None and TRAINS in program.state:
                    record(program, Trained(name, site.weight, weights, self.method))
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
        reason = scheme.refuse(channels, rows) or needs_gradient(program, expression)
        if reason:
            rewriter.refuse(node, reason)
            return

        def build(new: Builder) -> Node:
            if new.trains:
                rounded = trained_weight(new, table, scheme, Method.RTN)
                return new(aten.embedding.default, rounded, *node.args[1:], **node.kwargs)
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
        reason = weights.refuse(site.shape[1], site.shape[0]) if weights else None
        reason = reason or (activations.refuse_group(site.shape[1]) if activations else None)
        reason = reason or (needs_training(program) if activations else None)
        return reason or (needs_gradient(program, site.weight) if weights else None)

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
        if needs_training(program):
            return f'fuseline.prepare_qat(model, "{self}", example), trained as any module, then fuseline.convert'
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
