"""Each rule of `raise`: the spellings it sees through, what it refuses, and a counter-example for every refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fuseline.compiler.errors import FuselineError
from fuseline.compiler.framework import Pass
from fuseline.compiler.observe.numerics import error
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.program import Program
from fuseline.compiler.report import PassReport
from fuseline.compiler.rule import Rule
from fuseline.passes.raising import Raise

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
DIALECT = torch.ops.fuseline


def rand(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64).to(dtype)


def traced(function: Callable[..., Any], *inputs: torch.Tensor) -> Program:
    return Program.from_fx(make_fx(function, pre_dispatch=True)(*inputs), inputs)


def run(program: Program) -> torch.Tensor:
    torch.manual_seed(0)
    outputs = program.run(program.examples)
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def calls(program: Program) -> list[Any]:
    """The dialect ops of a program, as (name, arguments that are no tensors)."""
    return [
        (n.target._opname, tuple(a for a in n.args if not isinstance(a, torch.fx.Node)))
        for n in program.graph.nodes
        if getattr(n.target, "namespace", "") == "fuseline"
    ]


def raised(function: Callable[..., Any], *inputs: torch.Tensor, bound: float = 1e-12) -> tuple[Program, PassReport]:
    program = traced(function, *inputs)
    after, report = Pipeline("raise{allow_empty}").run(program, verification="full")
    assert error(run(after), run(program)) <= bound
    return after, report["raise"]


class Unguarded(Rule):
    """A rule whose guards are off."""

    def __init__(self, rule: Rule):
        self.rule = rule

    @property
    def name(self) -> str:
        return self.rule.name

    def matches(self, program: Program) -> Any:
        yield from self.rule.matches(program)

    def after(self, m: Any, new: Any) -> Any:
        return self.rule.after(m, new)


@dataclass(frozen=True)
class Force(Pass):
    """`raise` without refusals."""

    name = "force"

    def rules(self, program: Program) -> Any:
        return [Unguarded(rule._rule) for rule in Raise().rules(program)]


def refused(reason: str, function: Callable[..., Any], *inputs: torch.Tensor) -> Program:
    """The captured program, after a check that its site is refused for that reason and stays as it was."""
    program = traced(function, *inputs)
    after, report = Pipeline("raise{allow_empty}").run(program)
    assert reason in report["raise"].refused.values(), report["raise"].refused
    assert error(run(after), run(program)) == 0
    return program


def refused_rightly(reason: str, function: Callable[..., Any], *inputs: torch.Tensor) -> None:
    """Refused; and rewriting all the same would change the result."""
    program = refused(reason, function, *inputs)
    forced, _ = Pipeline([Force()]).run(program, verification="off")
    assert error(run(forced), run(program)) > 1e-3


def impossible(reason: str, function: Callable[..., Any], *inputs: torch.Tensor) -> None:
    """Refused; and rewriting all the same gives another type, or no result at all."""
    program = refused(reason, function, *inputs)
    with pytest.raises((FuselineError, RuntimeError)):
        run(Pipeline([Force()]).run(program, verification="off")[0])


# RMSNorm


def statistics(x: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


RMS = {
    "a power": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)),
    "a product": lambda x, w: x * (x * x).mean(-1, True).add(1e-3).rsqrt() * w,
    "a square": lambda x, w: w * (torch.rsqrt(x.square().mean(dim=2, keepdim=True) + 1e-3) * x),
    "a quotient": lambda x, w: w * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)),
    "a power of a half": lambda x, w: w * (x / (x.pow(2).mean(-1, keepdim=True) + 1e-3) ** 0.5),
    "a negative power": lambda x, w: w * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).pow(-0.5)),
    "a sum": lambda x, w: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 8 + 1e-3)),
}


@pytest.mark.parametrize("spelling", RMS)
def test_rms_norm_spellings(spelling: str) -> None:
    after, report = raised(RMS[spelling], rand(2, 3, 8), rand(8))
    assert report.rules == {"RMSNorm": 1}
    assert calls(after) == [("rms_norm", (1e-3, False, None, True))]
    assert len([n for n in after.graph.nodes if n.op == "call_function"]) == 1


FORMS = {
    "cast, then weight": (
        lambda x, w: w * (x.float() * statistics(x.float())).to(x.dtype),
        (1e-3, False, F32, True),
    ),
    "weight, then cast": (
        lambda x, w: (w * (x.float() * statistics(x.float()))).to(x.dtype),
        (1e-3, False, F32, False),
    ),
    "1 + w in float32": (
        lambda x, w: ((x.float() * statistics(x.float())) * (1.0 + w.float())).type_as(x),
        (1e-3, True, F32, False),
    ),
    "1 + w in its own type, then cast": (
        lambda x, w: ((x.float() * statistics(x.float())) * (1.0 + w)).type_as(x),
        (1e-3, False, F32, False),
    ),
    "1 + w after the cast": (
        lambda x, w: (x.float() * statistics(x.float())).to(x.dtype) * (1.0 + w),
        (1e-3, True, F32, True),
    ),
    "no cast": (lambda x, w: w * (x * statistics(x)), (1e-3, False, None, True)),
    "no cast back": (lambda x, w: w * (x.float() * statistics(x.float())), (1e-3, False, None, True)),
    "no weight": (lambda x, w: (x.float() * statistics(x.float())).to(x.dtype), (None, 1e-3, False, F32, True)),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rms_norm_is_bit_exact_in_every_form(form: str, dtype: torch.dtype) -> None:
    function, arguments = FORMS[form]
    after, report = raised(function, rand(2, 3, 8, dtype=dtype), rand(8, dtype=dtype), bound=0.0)
    assert report.rules == {"RMSNorm": 1}
    if dtype is not F32:
        assert calls(after) == [("rms_norm", arguments)]


def test_rms_norm_without_epsilon_and_with_a_gate() -> None:
    """What multiplies the norm is a weight only if it is a vector over the last dimension."""
    after, _ = raised(lambda x, g: g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))), rand(3, 8), rand(3, 8))
    assert calls(after) == [("rms_norm", (None, 0.0, False, None, True))]


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("eps", [1e-3, None])
def test_aten_rms_norm(dtype: torch.dtype, eps: float | None) -> None:
    after, report = raised(
        lambda x, w: F.rms_norm(x, (8,), w, eps), 1e-3 * rand(2, 8, dtype=dtype), rand(8, dtype=dtype), bound=1e-7
    )
    assert report.rules == {"RMSNorm": 1}


def test_rms_norm_refusals() -> None:
    x = rand(8, 8)
    refused_rightly(
        "the mean runs over the dimensions [0] of 2, not over the last one",
        lambda x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-3),
        x,
    )
    refused_rightly(
        "the sum of 8 squares is divided by 4",
        lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 4 + 1e-3),
        x,
    )
    refused_rightly(
        "it normalises over the last 2 dimensions, not over the last one",
        lambda x: F.rms_norm(x, (8, 8)),
        x * rand(8, 1),
    )
    impossible(
        "the mean is taken in torch.float64, the rest in torch.float32",
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=F64) + 1e-3),
        x.float(),
    )


def test_rms_norm_refuses_an_epsilon_that_is_data() -> None:
    program = refused(
        "ε is the tensor 'eps_1', not a number",
        lambda x, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps),
        rand(8, 8),
        torch.tensor(1e-3, dtype=F64),
    )
    # With the number that it was at capture, another ε at run time would go unseen.
    x, eps = rand(8, 8), torch.tensor(10.0, dtype=F64)
    assert error(DIALECT.rms_norm(x, None, 1e-3), program.run([x, eps])[0]) > 1e-2


# LayerNorm


def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


LAYER = {
    "mean of squares": lambda x, w, b: centred(x) / torch.sqrt(centred(x).pow(2).mean(-1, keepdim=True) + 1e-3) * w + b,
    "var": lambda x, w, b: b + w * (centred(x) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-3)),
    "correction": lambda x, w, b: w * (centred(x) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()) + b,
    "a call": lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-3),
}


@pytest.mark.parametrize("spelling", LAYER)
def test_layer_norm_spellings(spelling: str) -> None:
    after, report = raised(LAYER[spelling], rand(2, 3, 8), rand(8), rand(8, seed=1))
    assert report.rules == {"LayerNorm": 1} and not report.refused
    assert calls(after) == [("layer_norm", (1e-3,))]
    assert len([n for n in after.graph.nodes if n.op == "call_function"]) == 1


def test_layer_norm_without_weight_or_bias() -> None:
    bare = lambda x: centred(x) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-3)
    assert calls(raised(bare, rand(3, 8))[0]) == [("layer_norm", (None, None, 1e-3))]
    assert calls(raised(lambda x, w: bare(x) * w, rand(3, 8), rand(8))[0]) == [("layer_norm", (None, 1e-3))]


def test_layer_norm_refusals() -> None:
    x = rand(4, 4)
    refused_rightly(
        "the mean runs over the dimensions [0] of 2, not over the last one",
        lambda x: (x - x.mean(0, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-3),
        x,
    )
    refused_rightly(
        "the variance runs over the dimensions [0] of 2, not over the last one",
        lambda x: centred(x) / torch.sqrt(x.var(0, correction=0, keepdim=True) + 1e-3),
        x,
    )
    refused_rightly(
        "the variance is the unbiased one, divided by n − 1",
        lambda x: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-3),
        x,
    )
    refused_rightly(
        "ε is added to the standard deviation, not to the variance",
        lambda x: centred(x) / (x.std(-1, correction=0, keepdim=True) + 0.5),
        x,
    )
    refused_rightly(
        "it normalises over the last 2 dimensions, not over the last one", lambda x: F.layer_norm(x, (4, 4)), x
    )
    program = refused(
        "ε is the tensor 'eps_1', not a number",
        lambda x, eps: centred(x) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + eps),
        x,
        torch.tensor(1e-3, dtype=F64),
    )
    later = program.run([x, torch.tensor(10.0, dtype=F64)])[0]
    assert error(DIALECT.layer_norm(x, None, None, 1e-3), later) > 1e-2


# Rotary


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotate_chunks(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_split(x: torch.Tensor) -> torch.Tensor:
    first, second = x.split(x.shape[-1] // 2, -1)
    return torch.cat((second * -1, first), dim=3)


@pytest.mark.parametrize("rotate", [rotate_half, rotate_chunks, rotate_split])
def test_rotary_spellings(rotate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    inputs = rand(1, 2, 3, 8), rand(1, 1, 3, 8), rand(1, 1, 3, 8, seed=1)
    after, report = raised(lambda x, c, s: x * c + rotate(x) * s, *inputs)
    assert report.rules == {"Rotary": 1}
    after, report = raised(lambda x, c, s: s * rotate(x) + c * x, *inputs)
    assert report.rules == {"Rotary": 1}


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + rotate_half(x) * sin


def test_rotary_pairs_are_one_action_a_layer() -> None:
    """All layers share the angles; a layer's queries depend on the layer before, so they never pair with it."""

    def layers(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first = turned(q, cos[:, None], sin[:, None]) + turned(k, cos[:, None], sin[:, None])
        alone = turned(torch.tanh(first), cos[:, None], sin[:, None])
        last = torch.exp(-alone)
        return turned(last, cos[:, None], sin[:, None]) @ turned(last + q, cos[:, None], sin[:, None]).mT

    after, report = raised(layers, rand(1, 2, 3, 8), rand(1, 2, 3, 8, seed=1), rand(1, 3, 8), rand(1, 3, 8, seed=2))
    assert report.rules == {"RotaryPair": 2, "Rotary": 1}


def test_partial_rotary() -> None:
    def part(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return torch.cat([turned(x[..., :4], cos, sin), x[..., 4:]], -1)

    after, report = raised(part, rand(1, 2, 3, 8), rand(1, 1, 3, 4), rand(1, 1, 3, 4, seed=1))
    assert report.rules == {"Rotary": 1}
    after, report = raised(part, rand(1, 2, 3, 4), rand(1, 1, 3, 4), rand(1, 1, 3, 4, seed=1))
    assert "cat" not in {n.target._opname for n in after.graph.nodes if n.op == "call_function"}


def test_rotary_refusals() -> None:
    inputs = rand(1, 1, 8, 8), rand(1, 1, 8, 8, seed=1), rand(1, 1, 8, 8, seed=2)
    other = "what is joined is not [−second half, first half] of the input"
    refused_rightly(other, lambda x, c, s: x * c + torch.cat((-x[..., :4], x[..., 4:]), -1) * s, *inputs)
    refused_rightly(other, lambda x, c, s: x * c + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * s, *inputs)
    refused_rightly(other, lambda x, c, s: x * c + torch.cat((-x[..., 3:], x[..., :3]), -1) * s, *inputs)
    refused_rightly(
        "the halves are joined along dimension 2, not along the last one",
        lambda x, c, s: x * c + torch.cat((-x[:, :, 4:], x[:, :, :4]), 2) * s,
        *inputs,
    )


# Gated units

GATES = {
    "SwiGLU": [lambda g, u: F.silu(g) * u, lambda g, u: u * (g * torch.sigmoid(g))],
    "GEGLU": [
        lambda g, u: F.gelu(g) * u,
        lambda g, u: F.gelu(g, approximate="tanh") * u,
        lambda g, u: u * (g * 0.5 * (1.0 + torch.erf(g / math.sqrt(2.0)))),
        lambda g, u: 0.5 * g * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * torch.pow(g, 3.0)))) * u,
    ],
    "ReGLU": [lambda g, u: torch.relu(g) * u],
    "GLU": [lambda g, u: u * torch.sigmoid(g)],
}


@pytest.mark.parametrize("rule", GATES)
def test_gated_units(rule: str) -> None:
    for function in GATES[rule]:
        after, report = raised(function, rand(3, 8), rand(3, 8, seed=1))
        assert report.rules == {rule: 1}
        assert len([n for n in after.graph.nodes if n.op == "call_function"]) == 1


def test_gate_and_up_from_one_linear() -> None:
    def gated(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ w).chunk(2, -1)
        return up * F.silu(gate)

    assert raised(gated, rand(3, 8), rand(8, 6))[1].rules == {"SwiGLU": 1}


def test_what_gates_nothing() -> None:
    """An activation of its own input, a product with a number, one with another shape."""
    for function in (lambda x: x * torch.sigmoid(x), lambda x: F.silu(x) * 2.0, lambda x: F.silu(x) * x[:, :1]):
        after, report = raised(function, rand(3, 8))
        assert not report.rules and not report.refused


# Attention


def heads(h: int = 4, n: int = 5, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return rand(2, h, n, 4, seed=seed, dtype=dtype)


QKV = heads(), heads(seed=1), heads(seed=2)


def written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
    logits = how.get("logits", lambda s: s * 0.5)(q @ k.transpose(-1, -2))
    weights = how.get("softmax", lambda s: torch.softmax(s, -1))(logits)
    return how.get("weights", lambda w: w)(weights) @ v


def hidden() -> torch.Tensor:
    return torch.ones(5, 5, dtype=torch.bool).triu(1)


EAGER = {
    "scaled": (lambda s: s * 0.5, ("full", 0, 0, 0.0)),
    "divided": (lambda s: s / 2, ("full", 0, 0, 0.0)),
    "divided by a constant": (lambda s: s / torch.full([], 2.0, dtype=F64), ("full", 0, 0, 0.0)),
    "capped": (lambda s: 3 * torch.tanh(s * 0.5 / 3), ("full", 0, 0, 3)),
    "added": (lambda s: s / 2 + torch.full((5, 5), -torch.inf).triu(1), ("causal", 0, 0, 0.0)),
    "filled": (lambda s: (s / 2).masked_fill(hidden(), -torch.inf), ("causal", 0, 0, 0.0)),
    "filled with the lowest": (lambda s: (s / 2).masked_fill(hidden(), torch.finfo(F64).min), ("causal", 0, 0, 0.0)),
    "chosen": (lambda s: torch.where(~hidden(), s / 2, -torch.inf), ("causal", 0, 0, 0.0)),
    "capped and filled": (
        lambda s: (3 * torch.tanh(s * 0.5 / 3)).masked_fill(hidden(), torch.finfo(F64).min),
        ("causal", 0, 0, 3),
    ),
    "filled with a modest number": (lambda s: (s / 2).masked_fill(hidden(), -1e4), ("full", 0, 0, 0.0)),
    "chosen over a modest number": (lambda s: torch.where(~hidden(), s / 2, -1e4), ("full", 0, 0, 0.0)),
}


@pytest.mark.parametrize("spelling", EAGER)
def test_attention_written_out(spelling: str) -> None:
    logits, expected = EAGER[spelling]
    after, report = raised(lambda q, k, v: written(q, k, v, logits=logits), *QKV)
    assert report.rules == {"Attention": 1}
    ((name, arguments),) = [c for c in calls(after) if c[0] == "attention"]
    assert arguments[-4:] == expected and arguments[-5] == 0.5


@pytest.mark.parametrize(
    "how",
    [
        {"softmax": lambda s: torch.softmax(s, 3, dtype=F32).to(s.dtype)},
        {"weights": lambda w: F.dropout(w, 0.0, True)},
        {"weights": lambda w: F.dropout(w, 0.5, False)},
        {"logits": lambda s: s},
    ],
)
def test_attention_details(how: dict[str, Any]) -> None:
    after, report = raised(lambda q, k, v: written(q, k, v, **how), *QKV, bound=1e-6)
    assert report.rules == {"Attention": 1}


def test_keys_that_come_transposed() -> None:
    after, _ = raised(lambda q, k, v: torch.softmax(q @ k, -1) @ v, heads(), heads().mT.contiguous(), heads(seed=2))
    assert calls(after)[0][0] == "attention"


def test_attention_refusals() -> None:
    drop = "it drops weights with p=0.5: the op's backward would draw another mask"
    refused_rightly(drop, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), *QKV)
    refused_rightly(drop, lambda q, k, v: written(q, k, v, weights=lambda w: F.dropout(w, 0.5, True)), *QKV)
    refused_rightly(
        "the soft cap divides by 3 and multiplies by 2",
        lambda q, k, v: written(q, k, v, logits=lambda s: 2 * torch.tanh(s / 3)),
        *QKV,
    )
    refused_rightly(
        "the softmax runs over dimension 2 of 4, not over the keys",
        lambda q, k, v: written(q, k, v, softmax=lambda s: torch.softmax(s, 2)),
        *QKV,
    )
    impossible(
        "the mask is torch.float64, the queries are torch.float32",
        lambda q, k, v: written(
            q, k, v, logits=lambda s: s + torch.full((5, 5), -1.0, dtype=F64).triu(1), weights=lambda w: w.float()
        ),
        *(x.float() for x in QKV),
    )
    impossible(
        "the queries have the shape [4, 5, 4], not batch, heads, length, size",
        lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
        *QKV,
    )
    impossible(
        "the batch of the queries is 1, that of the keys 2",
        lambda q, k, v: F.scaled_dot_product_attention(q[:1], k, v),
        *QKV,
    )


@pytest.mark.parametrize(
    ("reason", "logits"),
    [
        ("the logits are scaled by the tensor 'a_1', not by a number", lambda s, a: s * a),
        ("the logits are scaled by the tensor 'a_1', not by a number", lambda s, a: s / a),
        ("the logits are capped by the tensor 'a_1', not by a number", lambda s, a: a * torch.tanh(s / a)),
        ("the logits are filled by the tensor 'a_1', not by a number", lambda s, a: s.masked_fill(hidden(), a)),
    ],
)
def test_attention_refuses_numbers_that_are_data(reason: str, logits: Callable[..., torch.Tensor]) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return written(q, k, v, logits=lambda s: logits(s, a))

    program = refused(reason, function, *QKV, torch.tensor(1.0, dtype=F64))
    # The result at capture, which a number taken then would keep giving, is not the result for another tensor.
    later = program.run([*QKV, torch.tensor(-30.0, dtype=F64)])[0]
    assert error(run(program), later) > 1e-2


# Repeated heads


def repeat_kv(x: torch.Tensor, groups: int = 2) -> torch.Tensor:
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, groups, t, d).reshape(b, h * groups, t, d)


@pytest.mark.parametrize(
    "repeat",
    [
        repeat_kv,
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).contiguous().view(2, 4, 5, 4),
        lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    ],
)
def test_repeated_heads_fold(repeat: Callable[[torch.Tensor], torch.Tensor]) -> None:
    inputs = heads(), heads(2, seed=1), heads(2, seed=2)
    after, report = raised(lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)), *inputs)
    assert report.rules == {"Attention": 1, "RepeatedHeads": 1}
    assert len([n for n in after.graph.nodes if n.op == "call_function"]) == 1


def test_one_head_for_all_folds() -> None:
    inputs = heads(), heads(1, seed=1), heads(1, seed=2)
    for repeat in (lambda x: x.expand(-1, 4, -1, -1), lambda x: x.repeat(1, 4, 1, 1)):
        after, report = raised(lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)), *inputs)
        assert report.rules == {"Attention": 1, "RepeatedHeads": 1}


def test_grouped_calls_and_uneven_groups() -> None:
    """`enable_gqa` needs no repetition; where keys and values are grouped apart, they are brought together."""
    grouped = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert raised(grouped, heads(), heads(2, seed=1), heads(2, seed=2))[1].rules == {"Attention": 1}
    after, report = raised(grouped, heads(), heads(2, seed=1), heads(1, seed=2))
    node = next(n for n in after.graph.nodes if n.target is DIALECT.attention.default)
    assert [n.meta["val"].shape[1] for n in node.args[1:3]] == [4, 4]


def test_tiled_heads_are_refused() -> None:
    inputs = heads(), heads(2, seed=1), heads(2, seed=2)
    reason = "the heads are tiled (0, 1, 0, 1), not repeated one by one (0, 0, 1, 1)"
    tile = lambda x: x.repeat(1, 2, 1, 1)
    stack = lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1, -1).reshape(2, 4, 5, 4)
    for repeat in (tile, stack):
        function = lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v))
        program = traced(function, *inputs)
        after, report = Pipeline("raise").run(program)
        assert list(report["raise"].refused.values()) == [reason]
        assert error(run(after), run(program)) < 1e-12
        forced, _ = Pipeline([Force()]).run(program)
        assert error(run(forced), run(program)) > 1e-3
