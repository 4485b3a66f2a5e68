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
    return run_with(model, options, (x,))


def run_with(model: nn.Module, options: str, args: tuple[torch.Tensor, ...]):
    program = fuseline.capture(model, args)
    after, report = fuseline.Pipeline(f"raise{{allow_empty}},quantize{{{options}}}").run(program, verification="full")
    return after, report["quantize"], after.to_module()(*args)


@pytest.mark.parametrize("group", (8, 4))
def test_keys_and_values_are_rounded_by_token_and_head(group: int) -> None:
    model, x = Attention().double(), torch.randn(2, 5, 32, dtype=torch.float64)
    _, report, found = run(model, f"keys=int4:g{group}:asym,values=int2:g{group}:asym", x)
    q, k, v = model.qkv(x).unflatten(-1, (-1, 8)).transpose(-2, -3).split((4, 2, 2), -3)
    k, v = affine(k, 4, group), affine(v, 2, group)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = model.out(mixed.transpose(-2, -3).flatten(-2))
    assert report.rules == {"keys": 1, "values": 1}
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


def test_keys_that_are_all_from_a_cache_are_refused() -> None:
    class Cached(nn.Module):
        def forward(self, q: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
            keys = past.transpose(1, 2)
            return F.scaled_dot_product_attention(q, keys, keys)

    q, past = torch.randn(1, 2, 1, 8), torch.randn(1, 5, 2, 8)
    program = fuseline.capture(Cached(), (q, past))
    with pytest.raises(PassError, match="this call adds none of its own"):
        fuseline.Pipeline("raise{allow_empty},quantize{keys=int4}").run(program)


KINDS = ("hadamard", "random-hadamard", "orthogonal")


class Step(nn.Module):
    """Attention over a cache, joined to it or written into it; the new keys and values are the caller's too."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.written = written
        self.qkv, self.out = nn.Linear(32, 64, bias=False), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor):
        q, k, v = self.qkv(x).unflatten(-1, (-1, 8)).transpose(-2, -3).split((4, 2, 2), -3)
        if self.written:
            keys, values = keys.index_copy_(2, at, k), values.index_copy_(2, at, v)
            mask = torch.arange(keys.shape[2]) <= at[:, None]
        else:
            keys, values, mask = torch.cat((keys, k), 2), torch.cat((values, v), 2), None
        mixed = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        return self.out(mixed.transpose(-2, -3).flatten(-2)), keys, values


@pytest.mark.one_in(8)
@pytest.mark.parametrize(
    "rotate", ["", "rotate{r2,r3},", "rotate{r2,r3,kind=random-hadamard},", "rotate{r2,r3,kind=orthogonal},"]
)
@pytest.mark.parametrize("written", [False, True])
def test_steps_over_a_cache_are_as_all_tokens_at_once(rotate: str, written: bool) -> None:
    """Token by token, each graph rounds what it adds, in the basis that the whole sequence is rounded in."""
    torch.manual_seed(0)
    step, whole = Step(written).double(), Attention().double()
    whole.load_state_dict(step.state_dict())
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    text = f"raise{{allow_empty}},{rotate}quantize{{keys=int4:asym,values=int3:asym}}"
    program = fuseline.capture(whole, (x,))
    after, _ = fuseline.Pipeline(text).run(program, verification="full")
    expected, plain = after.to_module()(x), whole(x)
    empty = torch.zeros(1, 2, 5 if written else 0, 8, dtype=torch.float64)
    keys, values, found = empty, empty.clone(), []
    for token in range(5):
        given = (x[:, token : token + 1], keys.clone(), values.clone(), torch.tensor([token]))
        graph = fuseline.capture(step, given)
        graph, report = fuseline.Pipeline(text).run(graph, verification="full")
        assert report["quantize"].rules == {"keys": 1, "values": 1} and not report["quantize"].refused
        if rotate:
            assert report["rotate"].rules == {"R2 pair": 1, "R3 pair": 1}
        y, keys, values = graph.to_module()(*given)
        found.append(y)
    error = (torch.cat(found, 1) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-10 < 1e-3 < (plain - expected).abs().max() / expected.abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_generation_with_a_cache_is_as_without() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.mul_(8)  # what it is initialised with gives logits too near to uniform
    text = "raise,rotate{r2,r3,kind=random-hadamard},quantize{keys=int4:asym,values=int4:asym}"
    ids = torch.randint(0, 64, (1, 9))
    plain = model(ids).logits
    fuseline.optimize(model, text, target="eager")
    expected = model(ids, use_cache=False).logits
    first = model(ids[:, :6], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for at in range(6, 9):
        steps.append(model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    error = (torch.cat(steps, 1) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5 < 1e-2 < (plain - expected).abs().max() / expected.abs().max()


def test_one_tensor_for_keys_and_values_is_rounded_once() -> None:
    class Shared(nn.Module):
        def forward(self, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            k = torch.sin(x)
            return F.scaled_dot_product_attention(q, k, k)

    args = (torch.randn(1, 2, 3, 8).double(), torch.randn(1, 2, 5, 8).double())
    after, report, found = run_with(Shared(), "keys=int4,values=int4", args)
    assert report.matched == 1
    k = ops.dequantize(*ops.quantize(torch.sin(args[1]), 4, 8), None, 8, 8, torch.float64)
    assert torch.allclose(found, F.scaled_dot_product_attention(args[0], k, k))
    _, report, _ = run_with(Shared(), "keys=int4,values=int3", args)
    assert "their schemes differ" in next(iter(report.refused.values()))


def test_no_attention_at_all() -> None:
    with pytest.raises(PassError, match="no attention was found"):
        run(nn.Linear(8, 8), "values=int8", torch.randn(2, 8))


@pytest.mark.parametrize(("option", "text", "part"), [
    ("activations", "int4:mse", "mse"), ("keys", "int9", "int9"), ("weights", "int9", "int9"),
])  # fmt: skip
def test_what_a_scheme_cannot_be(option: str, text: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        Quantize(**{option: text})
