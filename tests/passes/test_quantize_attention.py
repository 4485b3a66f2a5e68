"""`quantize{keys,values}`, and activations of few bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fuseline
from fuseline.compiler import ops
from fuseline.compiler.errors import PassError, UserError
from fuseline.passes import Quantize


class Attention(nn.Module):
    """Four query heads over two of keys and values, of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 64, bias=False), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 8)).transpose(-2, -3).split((4, 2, 2), -3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(-2, -3).flatten(-2))


def affine(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The textbook's asymmetric rounding over groups of the last dimension."""
    groups = x.unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return ((((groups / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale).flatten(-2)


def run(model: nn.Module, options: str, x: torch.Tensor):
    program = fuseline.capture(model, (x,))
    after, report = fuseline.Pipeline(f"raise{{allow_empty}},quantize{{{options}}}").run(program, verification="full")
    return after, report["quantize"], after.to_module()(x)


@pytest.mark.parametrize("group", (8, 4))
def test_keys_and_values_are_rounded_by_token_and_head(group: int) -> None:
    model, x = Attention().double(), torch.randn(2, 5, 32, dtype=torch.float64)
    _, report, found = run(model, f"keys=int4:g{group}:asym,values=int2:g{group}:asym", x)
    q, k, v = model.qkv(x).unflatten(-1, (-1, 8)).transpose(-2, -3).split((4, 2, 2), -3)
    k, v = affine(k, 4, group), affine(v, 2, group)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = model.out(mixed.transpose(-2, -3).flatten(-2))
    assert report.rules == {"attention": 1}
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_token_is_rounded_the_same_whatever_stands_beside_it() -> None:
    """So that codes could be kept in a cache and read later."""
    model, x = Attention().double(), torch.randn(1, 6, 32, dtype=torch.float64)
    whole, prefix = (run(model, "keys=int4:asym,values=int4:asym", part)[2] for part in (x, x[:, :4]))
    assert (whole[:, :4] - prefix).abs().max() <= 1e-12


def test_activations_of_four_bits_with_a_zero_point() -> None:
    model, x = nn.Linear(32, 6).double(), torch.randn(3, 32, dtype=torch.float64) + 1
    after, _, found = run(model, "activations=int4:token:asym", x)
    expected = model(affine(x, 4, 32))
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert ops.quantize_affine.overload in {n.target for n in after.graph.nodes}


def test_few_bits_cost_more() -> None:
    model, x = Attention().double(), torch.randn(2, 5, 32, dtype=torch.float64)
    costs = [(run(model, f"activations=int{bits}:token", x)[2] - model(x)).abs().mean() for bits in (8, 6, 4, 2)]
    assert costs == sorted(costs) and costs[0] < 0.1 * costs[-1]


def test_groups_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(PassError, match="group size 5 does not divide 8"):
        run(Attention(), "keys=int4:g5", torch.randn(1, 3, 32))
    with pytest.raises(PassError, match="group size 24 does not divide 32"):
        run(Attention(), "activations=int4:g24", torch.randn(1, 3, 32))


def test_keys_of_a_cache_are_refused() -> None:
    class Cached(nn.Module):
        def forward(self, q: torch.Tensor, past: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            keys = torch.cat((past, k * 2), -2)
            return F.scaled_dot_product_attention(q, keys, keys)

    q, past = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
    program = fuseline.capture(Cached(), (q, past, q))
    with pytest.raises(PassError, match="come from outside"):
        fuseline.Pipeline("raise{allow_empty},quantize{keys=int4}").run(program)


def test_no_attention_at_all() -> None:
    with pytest.raises(PassError, match="no attention was found"):
        run(nn.Linear(8, 8), "values=int8", torch.randn(2, 8))


@pytest.mark.parametrize(("option", "text", "part"), [
    ("activations", "int4:mse", "mse"), ("keys", "int9", "int9"), ("weights", "int3", "int3"),
])  # fmt: skip
def test_what_a_scheme_cannot_be(option: str, text: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        Quantize(**{option: text})
