"""Tiles compute what the whole does: results and gradients of eager, whatever the sizes; and take less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from fuseline.models.shapes import Decoder, Shape
from tests.passes.families import FAMILIES

SHAPE = Shape(hidden=32, inner=128, layers=2, heads=4, kv_heads=2, vocabulary=64)


def compiled(model: nn.Module, pipeline: str, **options: Any) -> tuple[Any, list[Any]]:
    torch.compiler.reset()
    record: list[Any] = []
    given = {"pipeline": pipeline, "target": "eager", "record": record.append, **options}
    return torch.compile(model, backend="fuseline", options=given), record


def gradients(call: Any, model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    out = call(*inputs)
    out = out if isinstance(out, torch.Tensor) else out.logits
    out.double().square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    least = max(b.abs().max() for b in expected[1:]) / 100
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(least)).item() for a, b in pairs)


class Mlp(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(8, 64), nn.Linear(64, 8), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.dropout(torch.nn.functional.gelu(self.up(x))))


sizes = given(batch=st.integers(1, 3), length=st.integers(5, 40), tiles=st.integers(2, 5), fixed=st.booleans())


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@sizes
def test_any_sizes(batch: int, length: int, tiles: int, fixed: bool) -> None:
    check_sizes(batch, length, tiles, fixed)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@sizes
def test_more_sizes(batch: int, length: int, tiles: int, fixed: bool) -> None:
    check_sizes(batch, length, tiles, fixed)


def check_sizes(batch: int, length: int, tiles: int, fixed: bool) -> None:
    torch.manual_seed(length)
    model = Decoder(SHAPE, loss=False).double()
    ids = torch.randint(0, 64, (batch, length))
    if not fixed:
        torch._dynamo.mark_dynamic(ids, 1)
    call, record = compiled(model, f"raise{{allow_empty}},tile{{tiles={tiles}}},checkpoint{{policy=full}}")
    found = gradients(call, model, [ids])
    assert record[0].report["tile"].rules == {"position-wise region": 2}
    assert worst(found, gradients(model, model, [ids])) < 1e-12


def test_one_graph_for_all_lengths() -> None:
    torch.manual_seed(0)
    model = Decoder(SHAPE, loss=False).double()
    call, record = compiled(model, "raise{allow_empty},tile{tiles=3},checkpoint{policy=full}")
    for length in (12, 19, 31):
        ids = torch.randint(0, 64, (2, length))
        torch._dynamo.mark_dynamic(ids, 1)
        assert worst(gradients(call, model, [ids]), gradients(model, model, [ids])) < 1e-12
    assert len(record) == 1


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3", "gemma2", "phi3", "gpt2", "mistral")),
    ],
)
def test_library_models(family: str) -> None:
    torch.manual_seed(0)
    dropped = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    wide = {"n_inner": 512} if family == "gpt2" else {"intermediate_size": 512}
    model = FAMILIES[family].build(**{**dropped, **wide}).train().double()
    model.config.use_cache = False
    ids = torch.randint(3, model.config.vocab_size, (2, 24))
    call, record = compiled(model, "raise{allow_empty},tile{tiles=3},checkpoint{policy=full}")
    found = gradients(call, model, [ids])
    assert record[0].report["tile"].rules["position-wise region"] == model.config.num_hidden_layers
    assert worst(found, gradients(model, model, [ids])) < 1e-6  # transformers computes norms in float32


def test_less_memory() -> None:
    model = Decoder(Shape(hidden=32, inner=256, layers=5, heads=4, kv_heads=2, vocabulary=64), loss=False)
    ids = torch.randint(0, 64, (1, 512))
    peaks = []
    for tile in ("", "tile{tiles=4},"):
        call, record = compiled(model, f"raise{{allow_empty}},{tile}checkpoint{{policy=full}}")
        call(ids).square().mean().backward()
        peaks.append(record[0].joint.module.meta["checkpoint"]["peak"])
    assert peaks[1] < 0.7 * peaks[0]


def test_inference_too() -> None:
    model, x = Mlp().double(), torch.randn(2, 11, 8, dtype=torch.float64)
    with torch.no_grad():
        call, record = compiled(model, "tile{tiles=4}")
        assert torch.allclose(call(x), model(x), atol=1e-14)
    assert record[0].report["tile"].rules == {"position-wise region": 1}


def test_dropout_is_drawn_for_all_positions_at_once() -> None:
    """What is in front of a random op and what is behind it are no region together."""
    model, x = Mlp(dropout=0.5).double().train(), torch.randn(2, 12, 8, dtype=torch.float64)
    call, _ = compiled(model, "tile{tiles=3,allow_empty}")
    torch.manual_seed(1)
    found = call(x)
    torch.manual_seed(1)
    assert torch.equal(found, model(x))


class Mixing(nn.Module):
    """Wide inside, and each position reads all others."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).softmax(1))


def test_what_reads_all_positions_ends_a_region() -> None:
    model, x = Mixing().double(), torch.randn(2, 12, 8, dtype=torch.float64)
    call, _ = compiled(model, "tile{tiles=3,allow_empty}")
    assert torch.allclose(call(x), model(x), atol=1e-14)
    call, _ = compiled(model, "tile{tiles=3}")
    with pytest.raises(BackendCompilerFailed, match="no region of the graph works position by position"):
        call(x)


OPS = {
    "wide": lambda x, m: m.down(torch.nn.functional.gelu(m.up(x))),
    "softmax": lambda x, m: x.softmax(-1),
    "softmax of positions": lambda x, m: x.softmax(1),
    "running sum": lambda x, m: x.cumsum(1),
    "mean of positions": lambda x, m: x - x.mean(1, keepdim=True),
    "extreme of positions": lambda x, m: x - x.amax(1, keepdim=True),
    "products of positions": lambda x, m: (x @ x.transpose(1, 2)) @ x / 8,
    "one row of tokens": lambda x, m: m.down(m.up(x.reshape(-1, 8))).view_as(x),
    "backwards": lambda x, m: x.flip(1),
    "shifted": lambda x, m: torch.cat([x[:, 1:], x[:, :1]], 1),
    "halves": lambda x, m: torch.cat(x.chunk(2, -1)[::-1], -1),
    "norm": lambda x, m: torch.nn.functional.layer_norm(x, (8,)),
    "turned": lambda x, m: m.down(m.up(x.transpose(0, 1))).transpose(0, 1),
    "positions as channels": lambda x, m: (m.mix @ x).tanh(),
    "weights of positions": lambda x, m: x * m.mix.sum(1, keepdim=True),
}


class Chain(nn.Module):
    def __init__(self, names: list[str], length: int):
        super().__init__()
        self.names = names
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)
        self.mix = nn.Parameter(torch.randn(length, length) / length)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = x + OPS[name](x, self) if name != "turned" else OPS[name](x, self)
        return x


def check_chain(names: list[str], length: int) -> None:
    torch.manual_seed(length)
    model, x = Chain(names, length).double(), torch.randn(2, length, 8, dtype=torch.float64)
    call, _ = compiled(model, "tile{tiles=3,allow_empty}")
    assert worst(gradients(call, model, [x]), gradients(model, model, [x])) < 1e-10


chains = given(names=st.lists(st.sampled_from([*OPS]), min_size=2, max_size=6), length=st.sampled_from([8, 9, 16]))


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@chains
def test_whatever_stands_around(names: list[str], length: int) -> None:
    check_chain(["wide", *names, "wide"], length)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@chains
def test_whatever_stands_around_more(names: list[str], length: int) -> None:
    check_chain(["wide", *names, "wide"], length)


def test_too_few_positions_are_refused_with_what_would_do() -> None:
    call, _ = compiled(Mlp(), "tile")
    with pytest.raises(BackendCompilerFailed, match=r"100 positions are too few to tile: tiles=2 or least=50"):
        call(torch.randn(1, 100, 8))
    call, _ = compiled(Mlp(), "tile{tiles=8}")
    with pytest.raises(BackendCompilerFailed, match=r"5 positions are too few to tile: tiles=5 or fewer would do"):
        call(torch.randn(1, 5, 8))
    call, record = compiled(Mlp(), "tile{least=50}")
    call(torch.randn(1, 100, 8))
    assert record[0].report["tile"].rules == {"position-wise region": 1}


@pytest.mark.parametrize("tiles", [1, -3])
def test_no_number_of_tiles(tiles: int) -> None:
    call, _ = compiled(Mlp(), f"tile{{tiles={tiles}}}")
    with pytest.raises(BackendCompilerFailed, match="cannot make"):
        call(torch.randn(1, 100, 8))


class Attending(nn.Module):
    """Grouped-query attention, causal or with a mask."""

    def __init__(self, heads: int = 4, kv_heads: int = 2):
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(16, heads * 4), nn.Linear(16, 2 * kv_heads * 4), nn.Linear(heads * 4, 16)
        self.grouped = heads != kv_heads

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, kv = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.kv))
        k, v = kv.chunk(2, 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=self.grouped
        )  # fmt: skip
        return self.o(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("heads", "kv_heads", "groups"), [(4, 2, 2), (6, 6, 3), (8, 4, 2)])
@pytest.mark.parametrize("masked", [None, 1, "each"])
def test_heads_in_groups(heads: int, kv_heads: int, groups: int, masked: Any) -> None:
    torch.manual_seed(0)
    model, x = Attending(heads, kv_heads).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    mask = torch.randn(2, heads if masked == "each" else 1, 12, 12, dtype=torch.float64) if masked else None
    call, record = compiled(model, f"raise{{allow_empty}},tile{{heads={groups}}}")
    assert worst(gradients(call, model, [x, mask]), gradients(model, model, [x, mask])) < 1e-12
    assert record[0].report["tile"].rules == {"heads apart": 1}


def test_heads_that_do_not_fall_into_groups() -> None:
    call, _ = compiled(Attending(6, 3), "raise{allow_empty},tile{heads=2}")
    with pytest.raises(BackendCompilerFailed, match="3 key heads do not fall into 2 groups: heads=3 would"):
        call(torch.randn(2, 12, 16))


def test_heads_are_grouped_where_many_positions_attend() -> None:
    torch.manual_seed(0)
    model, x = Attending(4, 2).double(), torch.randn(1, 64, 16, dtype=torch.float64)
    call, record = compiled(model, "raise{allow_empty},tile{least=8}")
    assert worst(gradients(call, model, [x]), gradients(model, model, [x])) < 1e-12
    assert record[0].report["tile"].rules == {"heads apart": 1}
