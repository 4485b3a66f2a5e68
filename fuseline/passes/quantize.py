"""Quantize weights and activations: `quantize`.

Before                                  after  quantize{weights=int4:g64,activations=int8:token}
    y = linear(x, W, b)                     q, s = quantize(x)                       one scale a token
                                            y = linear(dequantize(q, s), dequantize(pack(Wq), Ws, Wz), b)

`weights`       a number format (below) with a scale an output channel, `:gN` for groups of N input channels, `:bN` for
                blocks of N × N, `:tensor` for the whole weight; integers also `:sym`/`:asym`, those of 4 bits and less
                being asymmetric unless said otherwise. Rounded to nearest; `:mse` takes the range, group by group, that
                costs the least error.
`activations`   inputs of the products, rounded at run time: a number format with a scale a token, `:gN` or `:tensor`;
                symmetric unless an integer has `:asym`. `:static` takes one range for all calls, from data, by
                `observe`: `largest`, a running `mean` of each batch's ends, or `p99.9` of the values.
                `int2:thresholds` … `int4:thresholds`: between thresholds that training places (docs/qat.md).
`keys`, `values`  the same for those that a call makes for attention, one scale a head and token, before they go into a
                cache, which holds them rounded. Each token's codes depend on that token alone: step by step is as all
                at once. The cache itself keeps its type: it is its caller's. `fuseline.QuantizedCache` holds codes.
`method`        how codes are chosen; rtn and hqq need no data, paretoq and parq training (docs/qat.md), the others
                calibration data (docs/calibration.md):
                rtn     to the nearest code
                hqq     ranges fitted to Σ|error|^0.7, with no data
                gptq    column by column, each making up for what those before it lost, by what the site reads in this
                        very program; `static` takes scales from the weight as it was, `order` rounds the columns
                        that matter most first (it needs `static`), `damp` is the share of the Hessian's mean diagonal
                        that is added to it, `offload` keeps the values between layers on the CPU
                awq     to nearest, input channels scaled up first by |x|^α, α searched; scaled back where x is made
                smooth  the same with max|x|^α / max|w|^(1−α), `alpha` given, for activations that are rounded
                fpq     floating-point formats of as many bits (or those of `among`) and the ends of their ranges, by
                        the products' error; of static activations too, whose channels are first brought near each
                        other by powers of two
                lkd     part by part of the model, between places that one value crosses: weights are trained, over
                        `rounds` of the batches, so that the rounded part gives what it gave before
                paretoq ranges that training learns, with the weights
                parq    to nearest on a grid that the optimizer has drawn the weights to
`only`, `skip`  module paths to take or to leave, with `*`, separated by `|`: `only=*.mlp.*|*.o_proj`.
`overrides`     other weights by module path, the first that fits: `overrides=*.down_proj:int8|*.o_proj:int6:g64`. For
                other activations, write the pass twice: products that one has rounded are left by the next.
`bits`          a budget for the weights, `auto:40MB`, `auto:0.3x` of what they are or `auto:4.25bits` each: formats are
                chosen by site, from data, among int8 … int2 at the granularity of `weights`, or among `among`, so that
                the results change least (docs/quantization.md).

Formats: `int8` … `int2`; `fp8` (e4m3), `e5m2`, `fp6` (e3m2), `fp4` (e2m1), and any ExMy of 3 to 8 bits, with a real
number as its exponent's bias in each group; `mxfp8`, `mxfp6`, `mxfp4` (blocks of 32, a power of two as their scale),
`nvfp4` (blocks of 16, E4M3 scales and one for the tensor, of activations for the token); `ternary`, `binary`, and
`midrise4` … `midrise2`, half-way between whole numbers (±½, ±1½, …). Codes are packed without unused bits; kernels read
all of them, and multiply int8 and e4m3 activations by codes as they are where the weight's format allows
(docs/quantization.md, Kernels). A NaN or an infinity in a weight makes NaN of all that shares its scale, and so it does
in activations, but for integers with a scale a token or group.

Behind `rsparse` codes lie along the outputs, in groups of those, so that a channel left out is bytes left out.

Every linear whose weight is a parameter is a site, and so is a product with a parameter of the transposed layout
(`addmm`, `mm`) and a convolution (`conv1d`, `conv2d`, `conv3d`): its kernel is the matrix [out, in · positions], and
`activations` refuses it. Routed experts that `raise` has recognised are rounded by rtn and hqq, without activations.
Refused too are other stacks of matrices, recurrent layers and transposed convolutions.
The head, a linear over the vocabulary of an embedding of the same program, is quantized only when `only` names it, and
so are embeddings. Codes, scales and zero points are weight expressions: computed once, shared by all graphs of the
model, again when the parameter changes; those that gptq chose are the plan's, and refused for another weight.

Under autograd what gradients pass through is refused: rounding has none. In a program of `fuseline.prepare_qat` they
pass: weights, activations, keys and values are rounded by ops that have gradients (docs/qat.md).

awq and smooth scale where it is exact: in the scale of a norm, or the rows of a product, whose result nothing else
reads; everywhere else the site is rounded as it is, with the reason. A weight of several uses is refused by gptq.

Lossy. Sources: ZeroQuant (Yao et al., 2022), group-wise weights, token-wise activations, lkd; LLM-QAT (Liu et al.,
2023), token-wise keys and values; HQQ (Badri and Shaji, 2023); GPTQ (Frantar et al., 2023); AWQ (Lin et al., 2024);
SmoothQuant (Xiao et al., 2023); LLM-FP4 (Liu et al., 2023), real biases, pre-shifted ones and their search; SDQ (Huang
et al., 2022), bits by site; OCP Microscaling Formats 1.0; BitNet b1.58 (Ma et al., 2024), ternary; XNOR-Net (Rastegari
et al., 2016), binary; ParetoQ (Liu et al., 2025) and PARQ (Jin et al., 2025), training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..compiler.errors import UserError
from ..compiler.framework import Findings, Pass, Study, Tier
from ..compiler.plan import SitePlan
from ..compiler.program import TRAINS, Program
from ..compiler.registry import register
from ..compiler.rewriter import Rewriter
from ..compiler.schemes import Scheme
from .calibrated import CALIBRATED, TRAINED, Method, check_options, decide, findings, fold_scales, ladder
from .quantize_advice import nothing_matched, other_groups
from .quantize_attention import rounded_attention
from .quantize_codes import PLANNED, coded, decided_activations
from .quantize_embeddings import rounded_embedding
from .quantize_experts import rounded_experts
from .quantize_products import Codes, Products
from .quantize_sites import Site, heads, out_of_reach, path_of, sites
from .quantize_taken import left_out, names, refuse
from .quantize_training import check_to_train, check_trained, needs_training

aten = torch.ops.aten


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
    overrides: tuple[str, ...] = ()  # other weights for module paths, PATTERN:FORMAT…
    bits: str | None = None  # auto:BUDGET, weights' formats chosen by site
    among: tuple[str, ...] = ()  # the formats to choose from
    observe: str = "largest"  # static activations: largest, mean or p99.9
    static: bool = False  # gptq: scales of the weight as it was
    order: bool = False  # gptq: the columns that matter most first
    damp: float = 0.01  # gptq: share of the mean diagonal that is added to the Hessian
    offload: bool = False  # gptq, awq, smooth: values between layers on the CPU
    alpha: float = 0.5  # smooth: how much of the range goes from activations to weights
    rounds: int = 10  # lkd: how often over the batches

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
        """Whether codes, ranges or formats are decided from data, or by training."""
        activations = self.schemes()["activations"]
        static = bool(activations and activations.static)
        return self.method in CALIBRATED or self.bits is not None or static or self.is_trained

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
        by_product = self.method in PLANNED and self.method not in TRAINED
        weights, overrides = (None, ()) if self.activations and by_product else (self.weights, self.overrides)
        activations = self.activations and self.activations.replace(":static", "").replace(":thresholds", "")
        return Quantize(
            weights, activations, self.keys, self.values, self.only, self.skip, overrides=overrides, allow_empty=True
        )

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

    def candidates(self, path: str) -> tuple[Scheme, ...]:
        """The schemes that a weight may take: one, or those that `bits` chooses from."""
        for override in self.overrides:
            pattern, _, text = override.partition(":")
            if names(path, (pattern,)):
                return (Scheme.parse(text, weights=True),)
        weights = self.schemes()["weights"]
        if weights is None:
            return ()
        return ladder(weights, self.among) if self.bits else (weights,)

    def scheme(self, site: Site, decision: SitePlan | None) -> Scheme | None:
        """What a site's weight is rounded to; decision: the plan's, where there is one."""
        if decision is not None and "scheme" in decision.structure:
            return Scheme.parse(decision.structure["scheme"], weights=True)
        found = self.candidates(site.path)
        return found[0] if len(found) == 1 else None

    def run(self, program: Program, rewriter: Rewriter) -> None:
        if TRAINS in program.state:
            check_to_train(self)
        if self.method in (Method.AWQ, Method.SMOOTH):
            fold_scales(self, program, rewriter)
        codes = lambda site: coded(self, rewriter, site)
        self.apply(program, rewriter, codes if self.weights else None)

    def apply(self, program: Program, rewriter: Rewriter, codes: Codes | None) -> None:
        """Rounds all that this pass names, the weights of products by `codes`; None leaves those as they are."""
        schemes = self.schemes()
        if codes or schemes["activations"]:
            self._products(program, rewriter, codes, schemes["activations"])
            rounded_experts(self, program, rewriter)
        for node in list(program.graph.nodes):
            path = path_of(node.args[0]) if node.target is aten.embedding.default else None
            if path is not None and names(path, self.only) and (candidates := self.candidates(path)):
                if len(candidates) == 1:
                    rounded_embedding(program, rewriter, node, candidates[0])
                else:
                    rewriter.refuse(node, f"bits chooses for products: give it a format, overrides={path}:FORMAT")
        if schemes["keys"] or schemes["values"]:
            untrained = needs_training(program)
            rounded_attention(program, rewriter, schemes["keys"], schemes["values"], self._left_out, untrained)

    def admitted(self, program: Program) -> Iterator[Site]:
        """The sites that are rounded."""
        over_vocabulary = heads(program)
        for site in sites(program):
            if self._refuse(program, site, site.node in over_vocabulary) is None:
                yield site

    def _products(self, program: Program, rewriter: Rewriter, codes: Codes | None, activations: Scheme | None) -> None:
        products = Products(rewriter, self.method)
        over_vocabulary = heads(program)
        for node, path, why in out_of_reach(program) if self.weights else ():
            if not self._left_out(path):
                rewriter.refuse(node, why)
        for site in sites(program):  # found one by one: a rewrite changes what the next one reads
            reason = self._refuse(program, site, site.node in over_vocabulary)
            if reason is not None:
                if reason:
                    rewriter.refuse(site.node, reason)
                continue
            decision, rounding = None, activations
            if activations is not None and activations.static:
                decision = rewriter.decision(site.node)
                if decision is None:
                    continue
                rounding = decided_activations(activations, decision)
            chosen = codes(site) if codes is not None else None
            if chosen is not None or codes is None:
                products.round(site, chosen, rounding, decision)

    def _left_out(self, path: str) -> bool:
        return left_out(path, self.only, self.skip)

    def _refuse(self, program: Program, site: Site, head: bool) -> str | None:
        """A reason; "" for a site that the options leave out without a word; None to go ahead."""
        if self._left_out(site.path):
            return ""
        if site.is_sparse and self.needs_data:
            return (
                f"method={self.method.value} decides along the inputs, and the codes of a sparse product lie along its "
                "outputs: method=rtn or method=hqq"
            )
        unnamed = head and not names(site.path, self.only)
        return refuse(program, site, self.candidates(site.path), self.schemes()["activations"], unnamed)

    def nothing_matched(self, program: Program) -> tuple[str, ...]:
        return nothing_matched(self, program)

    def remedy(self, program: Program) -> str | None:
        if needs_training(program):
            return f'fuseline.prepare_qat(model, "{self}", example), trained as any module, then fuseline.convert'
        return other_groups(self, program)
