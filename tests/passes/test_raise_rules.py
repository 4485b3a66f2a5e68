"""The rules of `raise` for norms, rotary embeddings and gates: spellings, and refusals with counter-examples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fuseline.compiler.observe.numerics import error
from tests.passes.raise_helpers import (
    BF16,
    DIALECT,
    F32,
    F64,
    calls,
    impossible,
    raised,
    rand,
    refused,
    refused_rightly,
)

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
