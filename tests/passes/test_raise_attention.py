"""The rules of `raise` for attention and grouped heads: spellings, and refusals with counter-examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fuseline.compiler.observe.numerics import error
from fuseline.compiler.pipeline import Pipeline
from tests.passes.raise_helpers import (
    DIALECT,
    F32,
    F64,
    Force,
    calls,
    impossible,
    raised,
    rand,
    refused,
    refused_rightly,
    run,
    traced,
)

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


@pytest.mark.parametrize("fill", [5.0, 0.0, -1.0, -1e4])
@pytest.mark.parametrize("chosen", [False, True])
def test_attention_refuses_a_fill_that_cannot_be_added(fill: float, chosen: bool) -> None:
    everything = torch.ones(5, 5, dtype=torch.bool)  # a row that sees no key shows the difference at any fill

    def logits(s: torch.Tensor) -> torch.Tensor:
        return torch.where(~everything, s / 2, fill) if chosen else (s / 2).masked_fill(everything, fill)

    reason = f"hidden logits are replaced by {fill:g}, which a mask that is added cannot express"
    program = refused(reason, lambda q, k, v: written(q, k, v, logits=logits), *QKV)
    q, k, v = QKV
    added = F.scaled_dot_product_attention(q, k, v, torch.full((5, 5), fill, dtype=F64), scale=0.5)
    assert error(run(program), added) > 1e-2


def test_attention_written_out_keeps_its_own_gradient_where_a_row_may_see_no_key() -> None:
    mask = torch.zeros(5, 5, dtype=F64)
    mask[0] = torch.finfo(F64).min

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return written(q, k, v, logits=lambda s: s / 2 + mask.to(s.device))

    torch.compiler.reset()
    found: list[Any] = []
    compiled = torch.compile(function, backend="fuseline", options={"record": found.append})
    gradients = []
    for call in (function, compiled):
        inputs = [x.clone().requires_grad_() for x in QKV]
        call(*inputs).square().sum().backward()
        gradients.append([x.grad for x in inputs])
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        assert error(actual, expected) < 1e-9
    reasons = found[0].report["raise"].refused.values()
    assert list(reasons) == ["a row may see no key, and the op's gradient there is not that of what is written"]


# Repeated heads


def repeat_kv(x: torch.Tensor, groups: int = 2) -> torch.Tensor:
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, groups, t, d).reshape(b, h * groups, t, d)


def repeated(repeat: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v))


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
    after, report = raised(repeated(repeat), *inputs)
    assert report.rules == {"Attention": 1, "RepeatedHeads": 1}
    assert len([n for n in after.graph.nodes if n.op == "call_function"]) == 1


def test_one_head_for_all_folds() -> None:
    inputs = heads(), heads(1, seed=1), heads(1, seed=2)
    for repeat in (lambda x: x.expand(-1, 4, -1, -1), lambda x: x.repeat(1, 4, 1, 1)):
        after, report = raised(repeated(repeat), *inputs)
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
        program = traced(repeated(repeat), *inputs)
        after, report = Pipeline("raise").run(program)
        assert list(report["raise"].refused.values()) == [reason]
        assert error(run(after), run(program)) < 1e-12
        forced, _ = Pipeline([Force()]).run(program)
        assert error(run(forced), run(program)) > 1e-3
