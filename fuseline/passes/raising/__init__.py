"""Recognise what a model means, however it was written, and say it in one op each: `raise`.

Before                                                     after  raise
    h = x.float()                                              n = rms_norm(x, w, 1e-6, accumulate=float32)
    h = h * rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    n = w * h.to(x.dtype)
    q = q * cos + rotate_half(q) * sin                         q = rotary(q, cos, sin)
    k = k * cos + rotate_half(k) * sin                         k = rotary(k, cos, sin)
    mask = arange(T) <= arange(S)[:, None] …                   o = attention(q, k, v, None, scale, "causal")
    o = sdpa(q, k.repeat_interleave(3, 1), …, mask)
    y = silu(linear(n, Wg)) * linear(n, Wu)                    y = glu(linear(n, Wg), linear(n, Wu), "silu")
    for e, f in enumerate(experts): …                          y = moe(n, indices, weights, gate_up, down, …)

Recognised are RMSNorm (weights w or 1 + w, casts before or after), LayerNorm, rotary embeddings on halves, whole or
partial, SwiGLU, GEGLU, ReGLU and GLU, scaled dot-product attention as a call or written out (soft-capped too), and
keys and values repeated for grouped queries, routed experts. Each rule's file says which spellings. `experts=false`
leaves routed experts as they are written, products that `rotate{r4}` and `rsparse` can reach.

An attention's mask is proved, never guessed: the pass reads the mask's subgraph as a predicate over query and key
positions, symbolic sizes included, and shows that it equals `k ≤ q + offset` ("causal") or that with a window
("sliding"), joined with a padding mask over batch and keys ("causal", "sliding" or "full" with a mask [B, 1, 1, T]).
A mask that it cannot prove stays an argument ("full"), which is just as right; `meta["custom"]["fuseline_mask"]` of
the node says why. Attention that drops weights, or runs under autocast, stays PyTorch's call; a mask that is proved
causal becomes `is_causal=True` there, and one that shows everything goes. One difference is known: where attention is
written out with logits of minus infinity, a row that sees no key is NaN, and the op, as PyTorch's own call, gives zeros
there.

Exact: outputs agree within 1e-5 (max|Δ|/max|reference|, float32) and 1e-12 in float64 where a model casts nothing.
Nothing is rewritten across a border of `no_grad` or `autocast`, nor where tensors are written in place.

Source: the rules' files name the papers; the proof method is Fourier-Motzkin elimination as in Pugh, 1991, "The Omega
test", see `compiler/index_proof.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...compiler.framework import Pass, Tier
from ...compiler.program import Program
from ...compiler.registry import register
from ...compiler.rule import Rule
from .attention import Attention, CausalCall
from .attention_eager import EagerAttention
from .experts import SeparateExperts, StackedExperts
from .gated import GEGLU, GLU, ReGLU, SwiGLU
from .layer_norm import LayerNorm, LayerNormCall
from .mask_arguments import MaskArguments
from .masks import Masks
from .modes import Modes, WithinMode
from .repeat_kv import RepeatedHeads
from .rms_norm import RMSNorm, RMSNormCall
from .rotary import Rotary, RotaryPair


@register
@dataclass(frozen=True, kw_only=True)
class Raise(Pass):
    """Recognises norms, rotary embeddings, gated units, routed experts and attention."""

    name = "raise"
    tier = Tier.EXACT
    ensures = frozenset({"raised"})

    experts: bool = True  # whether a layer of routed experts becomes one op

    def rules(self, program: Program) -> Iterable[Rule]:
        masks = Masks(program)
        built = MaskArguments(masks.reader)
        modes = Modes(program.graph, program.training)
        # A LayerNorm written out holds an RMSNorm of the centred input, so it goes first.
        norms = (LayerNormCall(), LayerNorm(), RMSNormCall(), RMSNorm())
        gates = (SwiGLU(), GEGLU(), ReGLU(), GLU())
        attentions = (Attention(masks, built), EagerAttention(masks, built), RepeatedHeads())
        # What is gated is known by then.
        experts = (StackedExperts(), SeparateExperts(program.training)) if self.experts else ()
        for rule in (*norms, RotaryPair(), Rotary(), *gates, *experts, *attentions):
            yield WithinMode(rule, modes)
        yield CausalCall(masks, built)
