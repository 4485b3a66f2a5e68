"""quantize: structure before and after, numerics against a reference computed here, refusals and what they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import fuseline
from fuseline import Pipeline, Program, UserError
from fuseline.compiler.errors import EmptyPassError
from fuseline.compiler.expressions import Pack, Param, Transpose
from tests.helpers.models import Mlp, Tied, error, ops, tiny_llama
from tests.strategies import schemes

INTEGERS = [f"int{bits}" for bits in range(2, 9)]
integers = schemes(INTEGERS, (0, 2, 16)).filter(lambda s: not s.mse and s.rows == 1)


def quantized(model: torch.nn.Module, args: tuple, options: str, kwargs: dict | None = None):
    return Pipeline(f"quantize{{{options}}}").run(fuseline.capture(model, args, kwargs), verification="full")


def round_to_nearest(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """Round-to-nearest written out group by group in float64, with scales kept in float32: no code of ours."""
    result = torch.empty_like(weight, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            w = weight[row, start : start + group].double()
            if symmetric:
                top = 2 ** (bits - 1) - 1
                scale = (w.abs().max() / top).float().double()
                codes = (w / scale).round().clamp(-top - 1, top)
                result[row, start : start + group] = codes * scale
            else:
                low, high = min(w.min().item(), 0.0), max(w.max().item(), 0.0)
                scale = torch.tensor((high - low) / (2**bits - 1)).float().double()
                zero = (-low / scale).round()
                codes = (w / scale + zero).round().clamp(0, 2**bits - 1)
                result[row, start : start + group] = (codes - zero) * scale
    return result


def per_token(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


class Linear(torch.nn.Module):
    def __init__(self, inputs: int = 32, outputs: int = 6, bias: bool = True):
        super().__init__()
        self.fc = torch.nn.Linear(inputs, outputs, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_before_and_after() -> None:
    program = fuseline.capture(Linear(), (torch.randn(3, 32),))
    assert ops(program) == ["linear"]
    after, report = Pipeline("quantize{weights=int4:g16,activations=int8}").run(program, verification="full")
    assert ops(after) == ["quantize", "getitem", "getitem", "dequantize", "dequantize", "linear"]
    kinds = {n.name: (n.meta["val"].dtype, tuple(n.meta["val"].shape)) for n in after.weights()}
    assert kinds == {
        "fc_bias": (torch.float32, (6,)),
        "fc_weight_codes": (torch.uint8, (6, 16)),
        "fc_weight_scale": (torch.float32, (6, 2)),
        "fc_weight_zero": (torch.uint8, (6, 2)),
    }
    assert report["quantize"].matched == 1 and report["quantize"].tier == "lossy"


def check_nearest(scheme, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Linear(), torch.randn(3, 32)
    after, _ = quantized(model, (x,), f"weights={scheme}")
    weight = round_to_nearest(model.fc.weight.detach(), scheme.bits, scheme.group_of(32), scheme.symmetric)
    expected = x.double() @ weight.t() + model.fc.bias.double()
    # A code on the boundary between two may fall to either side in float32: then one product differs by a step.
    differing = (after.to_module()(x).double() - expected).abs() / expected.abs().max()
    assert differing.median() < 1e-6 and differing.max() < 0.5 / 2 ** (scheme.bits - 1)


@settings(max_examples=12)
@given(integers, st.integers(0, 99))
def test_results_are_those_of_round_to_nearest(scheme, seed: int) -> None:
    check_nearest(scheme, seed)


@pytest.mark.slow
@settings(max_examples=30)
@given(integers, st.integers(0, 99))
def test_more_results_are_those_of_round_to_nearest(scheme, seed: int) -> None:
    check_nearest(scheme, seed)


def test_activations_are_rounded_per_token() -> None:
    torch.manual_seed(0)
    model, x = Linear(), torch.randn(5, 32) * torch.logspace(-2, 2, 5)[:, None]
    after, _ = quantized(model, (x,), "activations=int8:token")
    expected = F.linear(per_token(x.double()), model.fc.weight.double(), model.fc.bias.double())
    assert error(after.to_module()(x).double(), expected) < 1e-5
    both, _ = quantized(model, (x,), "weights=int8,activations=int8")
    weight = round_to_nearest(model.fc.weight.detach(), 8, 32, True)
    assert error(both.to_module()(x).double(), F.linear(per_token(x.double()), weight, model.fc.bias.double())) < 1e-5


def test_activations_of_one_input_are_rounded_once() -> None:
    after, _ = quantized(Mlp(), (torch.randn(2, 8),), "weights=int8,activations=int8")
    assert ops(after).count("quantize") == 2  # one for gate and up together, one for down


class Products(torch.nn.Module):
    """Weights in the transposed layout, as convolution-style linears keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(16, 6))
        self.b = torch.nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.addmm(self.b, x, self.w), torch.mm(x, self.w), x @ self.w, torch.addmm(residual, x, self.w)


@torch.no_grad()
@pytest.mark.parametrize("options", ["weights=int8", "weights=int4:g8", "weights=int8,activations=int8"])
def test_products_with_a_transposed_weight(options: str) -> None:
    model, x, residual = Products(), torch.randn(3, 16), torch.randn(3, 6)
    after, report = quantized(model, (x, residual), options)
    assert report["quantize"].matched == 4
    assert ops(after).count("linear") == 4 and not {"addmm", "mm", "matmul"} & set(ops(after))
    packed = [e for e in after.lift()[1] if isinstance(e, Pack)]
    assert len(packed) == 1  # one set of codes for four products
    assert any(isinstance(e, Transpose) for e in packed[0].walk())
    bits, group = (4, 8) if "int4" in options else (8, 16)
    weight = round_to_nearest(model.w.t(), bits, group, "int4" not in options)
    inputs = per_token(x.double()) if "activations" in options else x.double()
    expected = [inputs @ weight.t() + c for c in (model.b, 0, 0, residual)]
    for actual, reference in zip(after.to_module()(x, residual), expected, strict=True):
        assert error(actual.double(), reference) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w.T, lambda x, w: x @ w.t(), lambda x, w: x @ w.transpose(-1, 0), lambda x, w: x @ w.mT,
        lambda x, w: torch.mm(x, w.permute(1, 0)),
    ],
)  # fmt: skip
def test_products_with_a_transposed_view_of_a_weight(product) -> None:
    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(6, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return product(x, self.w)

    model, x = Product(), torch.randn(3, 16)
    program = fuseline.capture(model, (x,))
    after, report = Pipeline("quantize{weights=int8}").run(program, verification="full")
    assert report["quantize"].matched == 1 and ops(after) == ["dequantize", "linear"]
    weight = round_to_nearest(model.w.detach(), 8, 16, True)  # a scale for each of the six outputs
    assert error(after.to_module()(x).double(), x.double() @ weight.t()) < 1e-5


def test_a_group_that_does_not_divide_is_refused_and_named() -> None:
    with pytest.raises(EmptyPassError) as caught:
        quantized(Linear(48), (torch.randn(1, 48),), "weights=int4:g32")
    text = str(caught.value)
    assert "asked for: weights=int4:g32 on 1 linears, such as fc (48 inputs)" in text
    assert "refused: 1 x group size 32 does not divide 48 (16 would)" in text
    assert "try: quantize{weights=int4:g16}" in text
    assert caught.value.exit_code == 2


def test_a_partial_match_reports_the_rest() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Linear(48, 32))
    after, report = quantized(model, (torch.randn(1, 32),), "weights=int4:g32")
    assert report["quantize"].matched == 1
    assert report["quantize"].refused == {"1/linear#0": "group size 32 does not divide 48 (16 would)"}


def test_no_linear_at_all() -> None:
    with pytest.raises(EmptyPassError, match="the program has no product with a parameter"):
        quantized(torch.nn.ReLU(), (torch.randn(3),), "weights=int8")


def test_only_and_skip() -> None:
    x = torch.randn(2, 8)
    for options, expected in (("only=up", 1), ("only=up|down", 2), ("skip=*e", 2), ("only=*,skip=down", 2)):
        after, report = quantized(Mlp(), (x,), f"weights=int8,{options}")
        assert (report["quantize"].matched, ops(after).count("dequantize")) == (expected, expected)
        assert not report["quantize"].refused  # what the options leave out is not worth a word


@pytest.mark.slow
def test_the_head_and_the_embedding_only_when_named() -> None:
    model = tiny_llama(num_hidden_layers=1)
    args, kwargs = (torch.tensor([[1, 2, 3]]),), {"use_cache": False}
    after, report = quantized(model, args, "weights=int8", kwargs)
    assert report["quantize"].matched == 7
    assert list(report["quantize"].refused.values()) == [
        "the model's head over its vocabulary: name it to quantize it, only=lm_head"
    ]
    after, report = quantized(model, args, "weights=int8,only=lm_head", kwargs)
    assert report["quantize"].rules == {"linear": 1}
    after, report = quantized(model, args, "weights=int8,only=*", kwargs)
    assert report["quantize"].rules == {"linear": 8, "embedding": 1}
    with torch.no_grad():
        assert error(after.to_module()(*args, **kwargs).logits, model(*args).logits) < 0.05


def test_an_embedding_gathers_codes_and_dequantizes_the_rows_only() -> None:
    model, ids = Tied(), torch.tensor([[3, 3, 1]])
    after, _ = quantized(model, (ids,), "weights=int4:g4,only=*")
    gathered = [n for n in after.graph.nodes if "embedding" in str(n.target)]
    assert [tuple(n.meta["val"].shape) for n in gathered] == [(1, 3, 4), (1, 3, 2), (1, 3, 2)]
    table = round_to_nearest(model.embed.weight.detach(), 4, 4, False)
    body = round_to_nearest(model.body.weight.detach(), 4, 4, False)
    expected = torch.relu(table[ids] @ body.t() + model.body.bias.double()) @ table.t()
    assert error(after.to_module()(ids).double(), expected) < 1e-5


def test_a_computed_table_is_refused() -> None:
    class Computed(Tied):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.body(F.embedding(ids, self.embed.weight * 2))

    _, report = quantized(Computed(), (torch.tensor([1]),), "weights=int8,only=*")
    assert report["quantize"].rules == {"linear": 1}


def test_training_is_refused_and_frozen_weights_are_not() -> None:
    model, x = Mlp(), torch.randn(2, 8)
    with pytest.raises(EmptyPassError, match="its weight wants a gradient, and rounding has none: train it"):
        Pipeline("quantize{weights=int8}").run(Program.from_fx(torch.fx.symbolic_trace(model), (x,)))
    for linear in (model.gate, model.up, model.down):
        linear.weight.requires_grad_(False)
    program = Program.from_fx(torch.fx.symbolic_trace(model), (x,))
    assert program.training
    after, report = Pipeline("quantize{weights=int8}").run(program)
    assert report["quantize"].matched == 3
    after.to_module()(x).sum().backward()
    assert model.norm.grad is not None and model.up.bias.grad is not None


def test_weight_bytes() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(3))).bfloat16()
    program = fuseline.capture(model, (torch.randn(2, 256).bfloat16(),))
    before = program.weight_bytes()
    assert before == 3 * 256 * 256 * 2
    for options, limit in (("int8", 0.51), ("int4:g64", 0.29)):
        after, _ = Pipeline(f"quantize{{weights={options}}}").run(program)
        assert after.weight_bytes() <= limit * before
        held = sum(t.numel() * t.element_size() for t in after.binder(after.lift()[1])(after.examples))
        assert held == after.weight_bytes()  # what the fake values say is what the store holds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_weights(dtype: torch.dtype) -> None:
    model, x = Linear().to(dtype), torch.randn(3, 32).to(dtype)
    after, _ = quantized(model, (x,), "weights=int8,activations=int8")
    result = after.to_module()(x)
    assert result.dtype == dtype and error(result.double(), model(x).double()) < 0.03


def test_a_batch_of_any_rank() -> None:
    model = Linear()
    for shape in ((32,), (2, 32), (2, 3, 32), (2, 1, 3, 32)):
        x = torch.randn(shape)
        after, _ = quantized(model, (x,), "weights=int8,activations=int8")
        assert error(after.to_module()(x), model(x)) < 0.03


def test_quantizing_twice_finds_nothing_more() -> None:
    after, _ = quantized(Linear(), (torch.randn(2, 32),), "weights=int8")
    with pytest.raises(EmptyPassError):
        Pipeline("quantize{weights=int4}").run(after)


def test_the_model_is_left_as_it_was() -> None:
    model, x = Mlp(), torch.randn(2, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after, _ = quantized(model, (x,), "weights=int4:g4")
    after.to_module()(x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {type(n.meta["weight"]) for n in fuseline.capture(model, (x,)).weights()} == {Param}


def test_neither_weights_nor_activations_is_an_error() -> None:
    with pytest.raises(UserError, match="needs to be told what to quantize") as caught:
        Pipeline("quantize{only=a}")
    assert "quantize{weights=int8}" in str(caught.value)
