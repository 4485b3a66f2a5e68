"""Every reason of `rotate` to refuse is right: the numbers say what goes wrong where it is folded anyway.

What R1 and R2 refuse is forced, which is exact as long as the operations that are left at run time are kept; a fold
would leave them out. Each test reads the reason, and what leaving them out does to the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fuseline
from fuseline import Program
from fuseline.compiler import ops
from fuseline.compiler.hadamard import hadamard_matrix
from fuseline.compiler.precision import error
from fuseline.compiler.provenance import makers
from fuseline.passes import rotation
from fuseline.passes.rotation import centring, folds
from fuseline.passes.rotation.carriers import carriers
from tests.passes.rotated_models import VOCABULARY, Decoder, Shape
from tests.passes.test_rotate import IDS, change, counts, program, rotated

aten = torch.ops.aten
WRONG = 1e-3
EXACT = 1e-12


def refusals(before: Program, options: str) -> str:
    return " | ".join(rotated(before, options)[1]["rotate"].refused.values())


def forced(before: Program, options: str, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program with whatever R1 and R2 would refuse."""
    with monkeypatch.context() as patch:
        patch.setattr(centring, "_refuse", lambda *_: None)
        patch.setattr(rotation, "_refuse_stream", lambda _: None)
        patch.setattr(rotation, "_refuse_values", lambda _: None)
        return rotated(before, options)[0]


def left(after: Program) -> list[Any]:
    """What R1 and R2 leave at run time: Hadamard transforms, and means that are taken away."""
    mine = [
        n for n in after.graph.nodes if makers(n) and makers(n)[-1].startswith(("rotate/R1", "rotate/R2", "rotate/l"))
    ]
    centred = [n for n in mine if n.target is aten.sub.Tensor and "layer norm" in makers(n)[-1]]
    return [*(n for n in mine if n.target is ops.hadamard.overload), *centred]


def without(after: Program, nodes: list[Any]) -> Program:
    """The program as if these had been folded: each operand in the place of its result."""
    for node in nodes:
        node.replace_all_uses_with(node.args[0])
    after.graph.eliminate_dead_code()
    after.module.recompile()
    return after


def counter(before: Program, options: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, float]:
    """How many operations the forced rotation leaves, and the error without them."""
    after = forced(before, options, monkeypatch)
    assert change(before, after) < EXACT, "with them it is exact"
    found = left(after)
    return len(found), change(before, without(after, found))


class Plain(nn.Module):
    """An embedding, what `between` makes of it with `parts`, and a head."""

    def __init__(
        self, between: Callable[..., torch.Tensor], width: int = 8, head: int = VOCABULARY, **parts: nn.Module
    ):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.between, self.parts = nn.Embedding(VOCABULARY, width), between, nn.ModuleDict(parts)
        self.head = nn.Linear(width, head, bias=False)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.data = torch.rand_like(parameter) + 0.5
        self.double().eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self.embed(ids), **self.parts))


def layer(width: int = 8) -> nn.Module:
    return nn.LayerNorm(width)


def rms(width: int = 8) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-5)


def linear(width: int = 8, out: int = 8) -> nn.Module:
    return nn.Linear(width, out)


R1_REFUSALS: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    # The reason; a model; how many operations would be left at least.
    "norms behind the blocks": (
        "operations would be left at run time, the first at", lambda: Decoder(Shape(sandwich=True)), 4),
    "q/k norms": (
        "no product reads what this norm returns",
        lambda: Plain(lambda x, norm, up: torch.tanh(norm(up(x))), norm=rms(), up=linear()), 1),
    "a norm of what no product writes": (
        "which R cannot be folded into, and nothing else",
        lambda: Plain(lambda x, norm: norm(torch.tanh(x)), norm=rms()), 1),
    "what adds to the stream is no product": (
        "others are no products",
        lambda: Plain(lambda x, norm, up: up(norm(torch.tanh(up(x)) + torch.sigmoid(up(x)) + torch.exp(x))),
                      norm=layer(), up=linear()), 3),
    "what writes the stream is no product": (
        "which cannot be centred, alone",
        lambda: Plain(lambda x, norm, up: up(norm(torch.tanh(x))), norm=layer(), up=linear()), 1),
    "others than products read a layer norm": (
        "what it returns is read by others than products",
        lambda: Plain(lambda x, norm: torch.tanh(norm(x)), norm=layer()), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", R1_REFUSALS)
def test_r1(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason, build, least = R1_REFUSALS[case]
    before = program(build())
    assert reason in refusals(before, "r1")
    number, wrong = counter(before, "r1", monkeypatch)
    assert number >= least and wrong > WRONG, (number, wrong)


def test_a_mean_that_others_read_cannot_be_folded_away() -> None:
    """Centring the table in place keeps what the norm returns, and changes what reads the stream beside it."""
    alone = Plain(lambda x, norm, up: up(norm(x)), norm=layer(), up=linear())
    beside = Plain(lambda x, norm, up, side: up(norm(x)) + side(x), norm=layer(), up=linear(), side=linear())
    assert "reads it as well, mean and all" in refusals(program(beside), "r1")
    assert not refusals(program(alone), "r1")
    for model, right in ((alone, True), (beside, False)):
        expected = model(IDS)
        with torch.no_grad():
            model.embed.weight -= model.embed.weight.mean(1, keepdim=True)
        off = error(model(IDS), expected)
        assert off < EXACT if right else off > WRONG, off


class Head(nn.Module):
    """One head of attention over [batch, tokens, 8]; `values` and `result` change what goes in and comes out."""

    def __init__(self, values: Callable[..., torch.Tensor] | None = None, result: Callable[..., Any] | None = None):
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.out = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.qkv = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.values, self.result = values or (lambda v: v), result
        self.double().eval()

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embed(ids)
        q, k, v = (made(x)[:, None] for made in self.qkv)
        y = F.scaled_dot_product_attention(q, k, self.values(v), is_causal=True)[:, 0]
        return self.out(y) if self.result is None else self.result(self, x, y)


R2_REFUSALS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "clipped values": ("the values come from ", lambda: Head(lambda v: v.clamp(-0.5, 0.5))),
    "a gate": (
        "reads single channels of what attention returns", lambda: Head(result=lambda m, x, y: m.out(y * x.sigmoid()))),
    "values that are kept": ("or keeps the values", lambda: Head(result=lambda m, x, y: (m.out(y), y))),
    "no product behind": (
        "reads single channels of what attention returns", lambda: Head(result=lambda m, x, y: torch.tanh(y))),
}  # fmt: skip


@pytest.mark.parametrize("case", R2_REFUSALS)
def test_r2(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason, build = R2_REFUSALS[case]
    before = program(build())
    assert reason in refusals(before, "r2")
    number, wrong = counter(before, "r2", monkeypatch)
    assert number >= 1 and wrong > WRONG, (number, wrong)
    assert counts(rotated(program(Head()), "r2")[1], "R2")["into rows"] == 1, "without it R2 folds"


class Step(Head):
    """A step of decoding: keys and values [1, 1, 6, 8] of the tokens before are read, and this token's are written."""

    def forward(self, ids: torch.Tensor, kept: torch.Tensor, values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = (made(x)[:, None] for made in self.qkv)
        kept.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        seen = (torch.arange(6) <= at)[None, None, None]
        return self.out(F.scaled_dot_product_attention(q, kept, values, attn_mask=seen)[:, 0])


def cache() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(1, 1, 6, 8, dtype=torch.float64, generator=generator) for _ in range(2))


STEP = (torch.tensor([[4]]), *cache(), torch.tensor([3]))


@pytest.mark.parametrize("label", ["R2", "R3"])
def test_what_goes_into_a_cache_keeps_its_basis(label: str) -> None:
    """A pair around this token's keys or values, and nothing that touches those of all positions."""
    before = program(Step(), *STEP)
    after, report = rotated(before, label.lower())
    assert report["rotate"].rules == {f"{label} pair": 1}
    assert {n.meta["val"].shape[2] for n in after.graph.nodes if n.target is ops.hadamard.overload} == {1}
    kept, rotated_kept = ([c.clone() for c in STEP[1:3]] for _ in range(2))
    expected = before.to_module()(STEP[0], *kept, STEP[3])
    assert error(after.to_module()(STEP[0], *rotated_kept, STEP[3]), expected) <= EXACT
    assert all(error(b, a) <= EXACT for a, b in zip(kept, rotated_kept, strict=True))
    assert not torch.equal(kept[0], STEP[1]), "the step has written"


@torch.no_grad()
@pytest.mark.parametrize("which", [1, 2])
def test_what_one_graph_turns_in_a_cache_another_reads_wrong(which: int) -> None:
    """A graph of its own wrote the tokens before: turned keys or values in it, as folded writers leave them."""
    model, (ids, *kept, at) = Step(), STEP
    expected = model(ids, *(c.clone() for c in kept), at)
    turned = [c.clone() for c in kept]
    turned[which - 1] = turned[which - 1] @ hadamard_matrix(8).double()
    assert error(model(ids, *turned, at), expected) > WRONG


class Recall(Head):
    """Attends to keys and values of another call alone."""

    def forward(self, ids: torch.Tensor, kept: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        q = self.qkv[0](self.embed(ids))[:, None]
        return self.out(F.scaled_dot_product_attention(q, kept, values)[:, 0])


def test_keys_of_another_call_alone_are_left() -> None:
    """Rotated at run time they cost all positions at every call; beside rotated queries they are wrong as they are."""
    model, args = Recall(), (torch.tensor([[4]]), *cache())
    assert "this call adds none of its own" in refusals(program(model, *args), "r3")
    q, k = torch.randn(3, 8).double(), torch.randn(5, 8).double()
    assert error(q @ hadamard_matrix(8).double() @ k.T, q @ k.T) > WRONG


class Both(Head):
    """What goes into the cache is read by a product, too."""

    def forward(self, ids: torch.Tensor, kept: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        q, k, v = (made(self.embed(ids))[:, None] for made in self.qkv)
        y = F.scaled_dot_product_attention(q, torch.cat((kept, k), 2), torch.cat((values, v), 2))[:, 0]
        return self.out(y) + k.sum(-1) @ q[:, 0]


def test_keys_that_others_read_are_left() -> None:
    args = (torch.tensor([[4]]), *cache())
    assert "reads what this call adds to them as well" in refusals(program(Both(), *args), "r3")
    k = torch.randn(1, 8).double()
    assert error((k @ hadamard_matrix(8).double()).sum(-1), k.sum(-1)) > WRONG, "what a rounding between would see"


def test_keys_that_others_read_and_no_cache_are_rotated_for_attention_alone() -> None:
    class Read(Head):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            q, k, v = (made(self.embed(ids))[:, None] for made in self.qkv)
            return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0]) + k.sum(-1) @ q[:, 0]

    before = program(Read())
    after, report = rotated(before, "r3")
    assert report["rotate"].rules == {"R3 online": 1}
    assert error(after.to_module()(IDS), before.to_module()(IDS)) <= EXACT


class Tied(nn.Module):
    """A product behind an activation, of the table that is looked up in as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed, self.up = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.double().eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(F.silu(self.up(self.embed(ids))))

    def inner(self, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, self.embed.weight)


@torch.no_grad()
def test_a_tied_weight_cannot_take_r4() -> None:
    """Rotated where it lies, the one table is also looked up in rotated."""

    class Turned(Tied):
        def inner(self, h: torch.Tensor) -> torch.Tensor:
            return super().inner(h @ matrix)

    matrix = hadamard_matrix(8).double()
    assert "R4: its weight wants a gradient, or is tied to an embedding" in refusals(program(Tied()), "r4")
    turned, expected = Turned(), Tied()(IDS)
    turned.embed.weight.copy_(turned.embed.weight @ matrix)
    assert error(turned(IDS), expected) > WRONG
    turned.embed.weight.copy_(turned.embed.weight @ matrix.T)
    h = F.silu(turned.up(turned.embed(IDS)))
    assert error(h @ matrix @ (turned.embed.weight @ matrix).T, expected) < EXACT, "two tables would do"


@pytest.mark.slow
def test_a_weight_that_wants_a_gradient_would_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient() -> torch.Tensor | None:
        model = fuseline.optimize(Decoder(Shape(layers=1)), "raise,rotate{r4,allow_empty}")
        model(IDS).sum().backward()
        return model.mlps[0].down.weight.grad

    expected = gradient()
    assert expected is not None and expected.abs().max() > 0
    monkeypatch.setattr(folds.Folds, "__call__", lambda self, weight: True)
    found = gradient()
    assert found is None or error(found, expected) > WRONG


def test_channels_that_are_no_number_of_blocks_have_no_such_matrix() -> None:
    before = program(Decoder(Shape(width=12, inner=20)))
    assert "R4: 20 channels are no number of blocks of 8" in refusals(before, "r4,block=8")
    with pytest.raises(fuseline.FuselineError, match="blocks of 8 do not divide 20 channels"):
        ops.hadamard(torch.randn(3, 20), None, 8, False)


REASONS = (
    *(reason for reason, _, _ in R1_REFUSALS.values()),
    *(reason for reason, _ in R2_REFUSALS.values()),
    "reads it as well, mean and all",
    "this call adds none of its own",
    "reads what this call adds to them as well",
    "its weight wants a gradient, or is tied to an embedding",
    "no number of blocks",
    "what routed experts' last product reads is made inside their one op",
)
"""The words of each reason that has a counter-example here, without names and numbers."""


def test_experts_keep_what_their_last_product_reads() -> None:
    def mixture(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weights, indices = x[:, :2].softmax(-1).topk(1, -1)
        return torch.ops.fuseline.moe(x, indices, weights, gate_up, down)

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = torch.nn.Parameter(torch.randn(2, 16, 8, dtype=torch.float64))
            self.down = torch.nn.Parameter(torch.randn(2, 8, 8, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return mixture(x, self.gate_up, self.down)

    with torch.no_grad():
        captured = fuseline.capture(Experts(), (torch.randn(3, 8, dtype=torch.float64),))
    _, report = fuseline.Pipeline("raise{allow_empty},rotate{r4,allow_empty}").run(captured)
    (reason,) = report["rotate"].refused.values()
    assert reason.startswith("R4: what routed experts' last product reads is made inside their one op")


def test_a_mask_takes_as_many_dimensions_as_it_has() -> None:
    """One that has them all picks single channels, which no basis survives; one that has all but the last, rows."""

    class Put(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return torch.index_put(x, (mask,), values)

    x, values = torch.randn(2, 5, 8), torch.randn(8)
    for dims, carried in ((1, True), (2, True), (3, False)):
        mask = torch.zeros(x.shape[:dims], dtype=torch.bool)
        mask.view(-1)[:: 10 if dims == 3 else 1] = True
        graph = fuseline.capture(Put(), (x, mask, values)).graph
        (node,) = [n for n in graph.nodes if n.target is torch.ops.aten.index_put.default]
        found = carriers(node, 8)
        assert found == ((node.args[0], node.args[2]) if carried else None), dims
        turned = torch.linalg.qr(torch.randn(8, 8))[0]
        commutes = torch.allclose(Put()(x @ turned, mask, values @ turned), Put()(x, mask, values) @ turned, atol=1e-5)
        assert commutes == carried
