"""Random networks out of what the passes look for: norms, gated units, rotary embeddings and attention in several
spellings, look-alikes of each, and between them other operations, tensors written in place and a cache.

A network is a list of steps, small tuples that a failure prints. Every value is [tokens, WIDTH].
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

WIDTH, HEADS, KEY_HEADS = 16, 4, 2
SIZE = WIDTH // HEADS
EPS = 1e-2  # large, so that a row that cancels to nothing does not blow roundings up

Tensor = torch.Tensor


def _rms(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


#: (x, weight) → the norm, and something inside of it that others may use.
NORMS: tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], ...] = (
    lambda x, w: ((h := x * _rms(x)) * w, h),
    lambda x, w: (w * (h := torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * x), h),
    lambda x, w: ((1.0 + w) * (h := x * _rms(x)), h),
    lambda x, w: ((h := x / torch.sqrt((x * x).sum(-1, keepdim=True) / WIDTH + EPS)) * (w + 1), h),
    lambda x, w: (x / (x.pow(2).mean(-1, keepdim=True) + EPS).pow(0.5), x * x),
    lambda x, w: (F.rms_norm(x, (WIDTH,), w, EPS), x),
    lambda x, w: (F.layer_norm(x, (WIDTH,), w, w, EPS), x),
    lambda x, w: ((c := _centred(x)) * torch.rsqrt((c * c).mean(-1, keepdim=True) + EPS) * w + w, c),
    lambda x, w: ((c := _centred(x)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) * w, c),
    # none of these is one
    lambda x, w: (x * torch.rsqrt((x * x).mean(0, keepdim=True) + EPS) * w, x),
    lambda x, w: (x / torch.sqrt((x * x).sum(-1, keepdim=True) / (WIDTH - 1) + EPS) * w, x),
    lambda x, w: (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + (w * w).mean() + EPS), x),
    lambda x, w: (w * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) + x, x),
)
#: (gate, up) → the gated unit, and something inside of it.
GATES: tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], ...] = (
    lambda a, b: ((s := F.silu(a)) * b, s),
    lambda a, b: (b * (s := a * torch.sigmoid(a)), s),
    lambda a, b: (b * (s := F.gelu(a)), s),
    lambda a, b: ((s := F.gelu(a, approximate="tanh")) * b, s),
    lambda a, b: ((s := 0.5 * a * (1.0 + torch.erf(a / math.sqrt(2.0)))) * b, s),
    lambda a, b: ((s := torch.relu(a)) * b, s),
    lambda a, b: ((s := torch.sigmoid(a)) * b, s),
    lambda a, b: ((s := torch.tanh(a)) * b, s),
    lambda a, b: ((s := F.silu(a)) * a + b, s),
    lambda a, b: (F.silu(a).mul_(b), a),
)
OTHERS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add, torch.sub, torch.maximum, lambda a, b: a * torch.sigmoid(b), lambda a, b: torch.tanh(a) * 2.0,
    lambda a, b: torch.softmax(a, -1) + b, lambda a, b: torch.where(a > b, a, b * 0.5), lambda a, b: -a,
    lambda a, b: torch.cat((a[:, 8:], b[:, :8]), -1), lambda a, b: a.clone().mul_(0.5),
    lambda a, b: a.clone()[:, :8].add_(1.0).repeat(1, 2), lambda a, b: F.linear(a, torch.tanh(b.t() @ b)),
)  # fmt: skip


def _turn(spelling: int, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x.chunk(2, -1) if spelling == 0 else (x[..., :half], x[..., half:])
    if spelling == 2:
        return torch.cat((b, -a), -1) * sin + x * cos  # the other way round: no rotary embedding
    return x * cos + torch.cat((-b, a), -1) * sin


MASKS = ("none", "causal", "built", "sliding", "added", "ahead", "behind", "odd")


def _mask(kind: str, length: Any, like: Tensor) -> Tensor | None:
    """A mask over positions: Boolean, or added to the logits."""
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None, :]
    if kind == "none":
        return None
    if kind == "sliding":
        return (columns <= rows) & (columns > rows - 3)
    if kind == "behind":
        return columns < rows  # the first row sees nothing
    if kind == "odd":
        return columns * 2 <= rows + 1
    seen = columns <= rows + 1 if kind == "ahead" else columns <= rows
    return torch.where(seen, 0.0, -1e30).to(like.dtype) if kind == "added" else seen


def _attend(mask: str, spelling: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [1, HEADS, S, SIZE], k and v [1, KEY_HEADS, S, SIZE] → [1, HEADS, S, SIZE]."""
    groups = HEADS // KEY_HEADS
    if spelling == 3:
        built = None if mask == "causal" else _mask(mask, q.shape[2], q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=built, is_causal=mask == "causal", enable_gqa=True)
    if spelling == 1:
        k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    else:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if spelling == 0:
        built = None if mask == "causal" else _mask(mask, q.shape[2], q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=built, is_causal=mask == "causal")
    scores = (q @ k.transpose(2, 3)) * SIZE**-0.5
    built = _mask(mask, q.shape[2], q)
    if built is not None:
        scores = scores + built if built.dtype != torch.bool else scores.masked_fill(~built, -1e30)
    return torch.softmax(scores, -1) @ v


class Blocks(torch.nn.Module):
    """A list of steps; each names the values that it takes by how far back they are, the input being the first.

    What no step takes is returned, and `outputs` besides. `cache` [tokens, WIDTH] is written to; `row` [1] says where
    one row of it goes. What is inside of a norm, a unit or an attention is a value too, which may be taken or not.
    """

    def __init__(self, steps: list[tuple[Any, ...]], outputs: list[int]):
        super().__init__()
        self.steps, self.outputs = steps, outputs
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4)
        self.weights = torch.nn.ParameterList([draw(WIDTH) for _ in range(2)])
        self.linears = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.double_linear = torch.nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.keys = torch.nn.Linear(WIDTH, KEY_HEADS * SIZE, bias=False)
        self.values = torch.nn.Linear(WIDTH, KEY_HEADS * SIZE)
        for name, parameter in self.named_parameters():
            if not name.startswith("weights"):
                parameter.data = draw(*parameter.shape).data
        self.requires_grad_(False)

    def forward(self, x: Tensor, cache: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        values, read = [x], set()

        def take(back: int) -> Tensor:
            index = len(values) - 1 - back % len(values)
            read.add(index)
            return values[index]

        def give(result: Tensor, inside: Tensor | None = None) -> None:
            if inside is not None:
                read.add(len(values))
                values.append(inside)
            values.append(result)

        for kind, *given in self.steps:
            if kind == "norm":
                give(*NORMS[given[0]](take(given[1]), self.weights[given[2]]))
            elif kind == "gate":
                y = take(given[3])
                give(*GATES[given[0]](self.linears[given[1]](y), self.linears[given[2]](y)))
            elif kind == "halves":
                give(*GATES[given[0]](*self.double_linear(take(given[1])).chunk(2, -1)))
            elif kind == "linear":
                give(self.linears[given[0]](take(given[1])))
            elif kind == "other":
                give(OTHERS[given[0]](take(given[1]), take(given[2])))
            elif kind == "attention":
                give(*self._attention(*given[:3], take(given[3]), cache if given[4] is None else take(given[4])))
            elif kind == "write":
                give(cache.copy_(torch.tanh(take(given[0]))) * 1.0)
            elif kind == "stale":  # read, written, and what was read is used
                y = take(given[0])
                old = cache * 0.5 + y
                cache.copy_(torch.tanh(y))
                give(torch.sigmoid(old) - y)
            elif kind == "append":
                cache.index_copy_(0, row, torch.tanh(take(given[0]))[:1])
            else:
                give(cache + take(given[0]))
        unread = [value for i, value in enumerate(values) if i not in read]
        return (*unread, *(take(back) for back in self.outputs))

    def _attention(self, mask: str, spelling: int, turned: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        heads = lambda t, n: t.unflatten(-1, (n, -1)).transpose(0, 1)[None]
        q, k = heads(self.linears[0](x), HEADS), heads(self.keys(y), KEY_HEADS)
        if turned < 3:
            angles = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * 0.3
            cos, sin = torch.cos(angles), torch.sin(angles)
            q, k = _turn(turned, q, cos, sin), _turn(turned, k, cos, sin)
        result = _attend(mask, spelling, q, k, heads(self.values(y), KEY_HEADS))
        return result[0].transpose(0, 1).flatten(-2), q[0].transpose(0, 1).flatten(-2)

    def __repr__(self) -> str:
        return f"Blocks({self.steps}, {self.outputs})"


_DRAWN = [
    *("norm", "gate", "attention") * 3, *("halves", "other", "write", "read") * 2, "linear", "append", "stale",
]  # fmt: skip


@st.composite
def blocks(draw: st.DrawFn, most: int = 7) -> Blocks:
    """Networks of up to `most` steps, which a seed chooses: drawn one by one they would be much alike, since hypothesis
    varies what it drew before. A failure shrinks to the fewest first steps of its seed."""
    pick = random.Random(draw(st.integers(0, 2**32 - 1)))
    return Blocks(
        [_step(pick) for _ in range(draw(st.integers(1, most)))], [_back(pick) for _ in range(pick.randint(0, 2))]
    )


def _back(pick: random.Random) -> int:
    return pick.randint(0, 2) if pick.random() < 0.7 else pick.randint(0, 20)


def _step(pick: random.Random) -> tuple[Any, ...]:
    kind, back = pick.choice(_DRAWN), _back(pick)
    if kind == "norm":
        return kind, pick.randrange(len(NORMS)), back, pick.randint(0, 1)
    if kind == "gate":
        return kind, pick.randrange(len(GATES)), pick.randint(0, 2), pick.randint(0, 2), back
    if kind == "halves":
        return kind, pick.randrange(len(GATES)), back
    if kind == "linear":
        return kind, pick.randint(0, 2), back
    if kind == "other":
        return kind, pick.randrange(len(OTHERS)), back, _back(pick)
    if kind == "attention":
        keys = None if pick.random() < 0.3 else _back(pick)
        return kind, pick.choice(MASKS), pick.randint(0, 3), pick.randint(0, 3), back, keys
    return kind, back
