"""What the mask prover claims, and what it must not: each claim beside the mask itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fuseline.compiler.capture import capture
from fuseline.compiler.observe.numerics import error
from fuseline.compiler.ops.attention import visibility
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.program import Program
from tests.passes.families import attentions

S, T = 6, 6
LOW = torch.finfo(torch.float32).min


def qkv(s: int = S, t: int = T) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, n, 4, generator=generator) for n in (s, t, t)]


def i(s: int = S) -> torch.Tensor:
    return torch.arange(s)[:, None]


def j(t: int = T) -> torch.Tensor:
    return torch.arange(t)[None, :]


def raised(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.fx.Node, Program]:
    """The attention of the raised program, which was compared with the captured one."""
    program = Program.from_fx(make_fx(function, pre_dispatch=True)(*inputs), inputs)
    after, report = Pipeline("raise").run(program, verification="full")
    assert report["raise"].rules["Attention"] == 1
    flat = program.examples
    assert error(first(after.run(flat)), first(program.run(flat))) < 1e-6
    (node,) = attentions(after)
    return node, after


def first(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def claim(mask: Callable[[], torch.Tensor], s: int = S, t: int = T) -> tuple[Any, ...]:
    """kind, offset, window of SDPA under a mask without inputs; the reason where the mask stayed."""
    node, _ = raised(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask()), *qkv(s, t))
    reason = node.meta["custom"].get("fuseline_mask")
    if reason is not None:
        assert node.args[3] is not None and node.args[5:8] == ("full", 0, 0)
        return (reason,)
    assert node.args[3] is None
    visible = visibility(*qkv(s, t)[:2], None, *node.args[5:8])
    written = mask() if mask().dtype == torch.bool else mask() == 0
    expected = written.expand(2, 2, s, t)
    assert torch.equal(torch.ones_like(expected) if visible is None else visible.expand(2, 2, s, t), expected)
    return node.args[5:8]


CLAIMS = {
    "k <= q": (lambda: j() <= i(), ("causal", 0, 0)),
    "q >= k": (lambda: i() >= j(), ("causal", 0, 0)),
    "k < q + 1": (lambda: j() < i() + 1, ("causal", 0, 0)),
    "not k > q": (lambda: ~(j() > i()), ("causal", 0, 0)),
    "tril": (lambda: torch.ones(S, T, dtype=torch.bool).tril(), ("causal", 0, 0)),
    "not triu": (lambda: torch.triu(torch.ones(S, T), diagonal=1) == 0, ("causal", 0, 0)),
    "one key to the right, off by one": (lambda: j() <= i() + 1, ("causal", 1, 0)),
    "strictly before": (lambda: j() < i(), ("causal", -1, 0)),
    "everything": (lambda: torch.ones(S, T, dtype=torch.bool), ("full", 0, 0)),
    "implied parts": (lambda: (j() <= i()) & (j() <= i() + 3) & (j() >= 0), ("causal", 0, 0)),
    "either of two": (lambda: (j() <= i()) | (j() < i()), ("causal", 0, 0)),
    "sliding": (lambda: (j() <= i()) & (j() > i() - 3), ("sliding", 0, 3)),
    "sliding, by distance": (lambda: ((i() - j()) < 3) & ((i() - j()) >= 0), ("sliding", 0, 3)),
    "sliding, two triangles": (
        lambda: torch.ones(S, T, dtype=torch.bool).tril() & torch.ones(S, T, dtype=torch.bool).triu(-2),
        ("sliding", 0, 3),
    ),
    "a window wider than the sequence": (lambda: (j() <= i()) & (j() > i() - 99), ("causal", 0, 0)),
    "a window on both sides": (lambda: ((i() - j()) < 3) & ((j() - i()) < 3), ("sliding", 2, 5)),
    "additive": (lambda: torch.where(j() <= i(), 0.0, LOW), ("causal", 0, 0)),
    "additive, infinite": (lambda: torch.full((S, T), float("-inf")).triu(1), ("causal", 0, 0)),
    "additive, multiplied": (lambda: (1.0 - (j() <= i()).float()) * LOW, ("causal", 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("spelling", CLAIMS)
def test_claims(spelling: str) -> None:
    mask, expected = CLAIMS[spelling]
    assert claim(mask) == expected


OTHERWISE = "the mask depends on positions in another way than causal or sliding"
KEPT = {
    "keys after the query": (lambda: j() >= i(), OTHERWISE),
    "a window without an end": (lambda: j() > i() - 3, OTHERWISE),
    "all but the diagonal": (lambda: j() != i(), OTHERWISE),
    "every second key": (lambda: (j() % 2 == 0) & (j() <= i()), "the padding is no tensor over batch and keys"),
    "slope 2": (lambda: j() <= 2 * i(), OTHERWISE),
    "the last keys hidden": (lambda: (j() <= i()) & (j() < 4), OTHERWISE),
    "a bias": (lambda: torch.where(j() <= i(), 0.0, -2.0), "the mask's elements are computed from data"),
    "nothing": (lambda: j() > i() + 99, "the mask hides every key"),
    "an empty row under a finite fill": (
        lambda: torch.where(j() < i(), 0.0, LOW),
        "a row may see no key, and the mask adds a finite number there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", KEPT)
def test_kept(spelling: str) -> None:
    """These stay masks; the nearest claim, forced, would change the result."""
    mask, reason = KEPT[spelling]
    assert claim(mask) == (reason,)
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v, mask())
    offset = -1 if "empty row" in spelling else 0
    forced = torch.ops.fuseline.attention(q, k, v, None, 0.5, "causal", offset)
    assert error(forced, expected) > 1e-2


def test_more_keys_than_queries() -> None:
    """A prefill into a longer buffer is causal from the first key; a continuation has an offset."""
    assert claim(lambda: j(9) <= i(4), 4, 9) == ("causal", 0, 0)
    assert claim(lambda: j(9) <= i(4) + 5, 4, 9) == ("causal", 5, 0)
    assert claim(lambda: j(9) <= i(1) + 8, 1, 9) == ("full", 0, 0)
    assert claim(lambda: j(9) <= i(1) + 5, 1, 9) == ("causal", 5, 0)
    assert claim(lambda: (j(9) <= i(1) + 8) & (j(9) > i(1) + 8 - 4), 1, 9) == ("sliding", 8, 4)


def masked(mask: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda q, k, v, data: F.scaled_dot_product_attention(q, k, v, mask(data))


PADDING = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]]).bool()


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (lambda p: (j() <= i()) & p[:, None, None, :], ("causal", 0, 0)),
        (lambda p: p[:, None, None, :] & (j() <= i()) & (j() > i() - 3), ("sliding", 0, 3)),
        (lambda p: p[:, None, None, :].expand(-1, -1, S, -1), ("full", 0, 0)),
        (lambda p: ~(~p)[:, None, None, :] & (j() <= i()), ("causal", 0, 0)),
        (lambda p: p[torch.arange(2)[:, None, None, None], j()[None, None]] & (j() <= i()), ("causal", 0, 0)),
        (lambda p: (p & p.flip(-1))[:, None, None, :] & (j() <= i()), ("causal", 0, 0)),
        (lambda p: p[:, None, None, :] & p.flip(-1)[:, None, None, :] & (j() <= i()), ("causal", 0, 0)),
    ],
)
def test_padding(mask: Callable[[torch.Tensor], torch.Tensor], kind: Any) -> None:
    """The caller's padding becomes a mask [B, 1, 1, T] beside the proved kind."""
    node, _ = raised(masked(mask), *qkv(), PADDING)
    assert node.args[5:8] == kind
    assert tuple(node.args[3].meta["val"].shape) == (2, 1, 1, T)
    assert node.args[3].meta["val"].dtype == torch.bool


ON_QUERIES = "the mask depends on data and on the query or the head"


@pytest.mark.parametrize(
    ("mask", "data", "reason"),
    [
        (lambda p: (j() <= i()) & p[:, None, :, None], PADDING, ON_QUERIES),
        (lambda p: (j() <= i()) & p[None, :, None, :], PADDING, ON_QUERIES),
        (lambda d: d[:, None], torch.rand(2, S, T) > 0.4, ON_QUERIES),
        (lambda n: j() <= i() + n, torch.tensor(1), ON_QUERIES),
        (lambda d: d[:, None, None, :].float(), torch.rand(2, T), "the mask's elements are computed from data"),
        (
            lambda p: torch.where(p[:, None, None, :] & (j() <= i()), 0.0, LOW),
            PADDING,
            "padding may leave a row without a key, and the mask adds a finite number there",
        ),
    ],
)
def test_data_that_is_no_padding(mask: Callable[[torch.Tensor], torch.Tensor], data: torch.Tensor, reason: str) -> None:
    node, _ = raised(masked(mask), *qkv(), data)
    assert node.args[5] == "full" and node.meta["custom"]["fuseline_mask"] == reason
    q, k, v = qkv()
    forced = torch.ops.fuseline.attention(q, k, v, None, 0.5, "causal")
    expected = F.scaled_dot_product_attention(q, k, v, mask(data))
    assert error(torch.nan_to_num(forced), torch.nan_to_num(expected)) > 1e-2


def test_packed_sequences_are_not_there() -> None:
    """Positions that come from `arange` never start again, so the search for packed sequences finds one."""

    def packed(positions: torch.Tensor) -> torch.Tensor:
        starts = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
        sequence = starts.cumsum(-1)
        return (j() <= i()) & (sequence[:, None, :, None] == sequence[:, None, None, :])

    assert claim(lambda: packed(torch.arange(S)[None].expand(2, -1))) == ("causal", 0, 0)
    restarted = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    node, _ = raised(masked(packed), *qkv(), restarted)
    assert node.meta["custom"]["fuseline_mask"] == ON_QUERIES


def test_a_mask_written_in_place_stays() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        mask = (j() <= i()).clone()
        row = mask[2]
        row.copy_(data)
        return F.scaled_dot_product_attention(q, k, v, mask)

    node, _ = raised(function, *qkv(), torch.ones(T, dtype=torch.bool))
    assert node.args[5] == "full" and "is written in place" in node.meta["custom"]["fuseline_mask"]


class Continued(torch.nn.Module):
    """New queries against a cache: keys of past and present, the first query after the past."""

    def forward(self, q: torch.Tensor, past: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        keys = torch.cat([past, k], 2)
        i = torch.arange(q.shape[2])[:, None] + past.shape[2]
        return F.scaled_dot_product_attention(q, keys, keys, torch.arange(keys.shape[2]) <= i)


def test_a_symbolic_offset() -> None:
    """The offset is a size that the graph computes, and the program serves other lengths."""
    auto = {2: torch.export.Dim.AUTO}
    inputs = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 4)
    program = capture(Continued(), inputs, dynamic={"q": auto, "past": auto, "k": auto})
    after, _ = Pipeline("raise").run(program, verification="full")
    (node,) = attentions(after)
    assert node.args[3] is None and node.args[5] == "causal"
    assert str(node.args[6].meta["val"]) == str(program.placeholders[1].meta["val"].shape[2])
    for s, past in ((3, 5), (7, 2), (2, 11)):
        inputs = torch.randn(1, 2, s, 4), torch.randn(1, 2, past, 4), torch.randn(1, 2, s, 4)
        assert error(after.to_module()(*inputs), Continued()(*inputs)) < 1e-6


def test_dead_mask_code_is_erased() -> None:
    """What built a proved mask goes away with the call that used it."""
    node, after = raised(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, j() <= i()), *qkv())
    assert [n.name for n in after.graph.nodes if n.op == "call_function"] == [node.name]
