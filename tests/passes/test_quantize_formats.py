"""quantize with every number format: graphs before and after, numerics, refusals, save and load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fuseline
from fuseline import Pipeline
from fuseline.compiler.errors import EmptyPassError, UserError
from fuseline.compiler.schemes import KERNELS, Scheme
from tests.helpers.models import Mlp, error, ops

# One of each way to store codes and scales.
NAMES = ["int8", "int4", "int3", "e4m3", "e5m2", "e2m1", "e3m2", "mxfp8", "mxfp4", "nvfp4", "ternary", "binary"]
TEXTS = [*NAMES, "int3:g32:sym", "int8:tensor", "int4:b32", "fp8:b32", "fp6:tensor", "fp4:g16:mse", "ternary:g32:mse"]


class Linear(torch.nn.Module):
    def __init__(self, inputs: int = 64, outputs: int = 32) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def quantized(model: torch.nn.Module, args: tuple, options: str):
    return Pipeline(f"quantize{{{options}}}").run(fuseline.capture(model, args), verification="full")


def rounded(text: str, weight: torch.Tensor) -> torch.Tensor:
    scheme = Scheme.parse(text, weights=True)
    return scheme.rounded(weight.detach(), scheme.narrowed(weight.detach())).double()


@torch.no_grad()
@pytest.mark.parametrize("text", TEXTS)
def test_weights(text: str) -> None:
    torch.manual_seed(0)
    model, x = Linear(), torch.randn(3, 64)
    after, report = quantized(model, (x,), f"weights={text}")
    scheme = Scheme.parse(text, weights=True)
    assert ops(after) == ["dequantize" if scheme.format in KERNELS else "decode", "linear"]
    assert report["quantize"].matched == 1
    expected = F.linear(x.double(), rounded(text, model.fc.weight), model.fc.bias.double())
    assert error(after.to_module()(x).double(), expected) < 1e-5
    held = sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in after.weights() if "bias" not in n.name)
    outer = 4 if scheme.format == "nvfp4" else 0
    assert held == pytest.approx(scheme.bytes_per_weight(64) * 32 * 64 + outer)


class Lookup(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(8, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_an_embedding_gathers_codes_of_any_format(name: str) -> None:
    model, ids = Lookup(), torch.tensor([[3, 3, 1]])
    after, report = quantized(model, (ids,), f"weights={name},only=*")
    assert report["quantize"].rules == {"embedding": 1}
    assert error(after.to_module()(ids).double(), rounded(name, model.embed.weight)[ids]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("text", ["fp8", "e5m2:token", "fp6:g16", "fp4:g32", "mxfp8", "mxfp4", "nvfp4", "int8:tensor"])
def test_activations(text: str) -> None:
    torch.manual_seed(0)
    model, x = Linear(), torch.randn(2, 5, 64)
    after, _ = quantized(model, (x,), f"activations={text}")
    assert ops(after) == ["encode", "getitem", "getitem", "decode", "linear"]
    inputs = x.flatten(0, 1)
    if text == "nvfp4":  # each token has its own outer scale
        inputs = torch.cat([rounded(text, row) for row in inputs.split(1)])
    else:
        inputs = rounded(text.replace(":token", ""), inputs)
    expected = F.linear(inputs.view(x.shape), model.fc.weight.double(), model.fc.bias.double())
    assert error(after.to_module()(x).double(), expected) < 1e-5


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(64, 64) for _ in range(3))

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [p(x).unflatten(-1, (2, 32)).transpose(1, 2) for p in (self.q, self.k, self.v)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self.heads(x), is_causal=True)


@torch.no_grad()
def test_keys_and_values() -> None:
    model, x = Attention(), torch.randn(1, 6, 64)
    text = "raise,quantize{keys=mxfp8,values=fp4}"
    after, report = Pipeline(text).run(fuseline.capture(model, (x,)), verification="full")
    assert report["quantize"].matched == 2 and ops(after).count("encode") == 2
    q, k, v = model.heads(x)
    expected = F.scaled_dot_product_attention(q.double(), rounded("mxfp8", k), rounded("fp4", v), is_causal=True)
    assert error(after.to_module()(x).double(), expected) < 1e-5


def test_keys_have_no_scale_that_later_tokens_change() -> None:
    with pytest.raises(UserError, match="'keys=fp8:tensor': one scale for all tokens would change the codes") as caught:
        Pipeline("raise,quantize{keys=fp8:tensor}")
    assert "try: keys=e4m3:token" in str(caught.value)


def test_blocks_that_do_not_divide_are_refused_with_what_would() -> None:
    with pytest.raises(EmptyPassError) as caught:
        quantized(Linear(48), (torch.randn(1, 48),), "weights=mxfp4")
    text = " ".join(str(caught.value).split())
    assert "mxfp4 has blocks of 32, which do not divide 48 (e2m1:g16 would)" in text
    assert "try: quantize{weights=e2m1:g16}" in text
    with pytest.raises(EmptyPassError, match=r"blocks of 64 rows do not divide 32 \(b16, b32 would\)"):
        quantized(Linear(), (torch.randn(1, 64),), "weights=fp8:b64")
    with pytest.raises(EmptyPassError, match="nvfp4 has blocks of 16, which do not divide 24"):
        quantized(Linear(24), (torch.randn(1, 24),), "activations=nvfp4")


@torch.no_grad()
@pytest.mark.one_in(4)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("text", ["weights=mxfp4", "weights=nvfp4,activations=fp8", "weights=fp8:b8", "weights=int3"])
def test_saved_and_loaded(text: str, keep: bool, tmp_path: Path) -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)), torch.randn(3, 64)
    plain = model(x)
    fuseline.optimize(model, f"quantize{{{text}}}", keep_originals=keep)
    result = model(x)
    loaded = fuseline.load(fuseline.save(model, tmp_path / "out"), model=lambda: model.__class__(*map(_fresh, model)))
    assert not torch.equal(result, plain) and torch.equal(loaded(x), result)


def _fresh(layer: torch.nn.Module) -> torch.nn.Module:
    return (
        torch.nn.Linear(layer.in_features, layer.out_features)
        if isinstance(layer, torch.nn.Linear)
        else torch.nn.ReLU()
    )


@torch.no_grad()
def test_a_format_without_a_kernel_is_no_failure() -> None:
    """`fuse` leaves the expansion of groups that no kernel reads outside of the linear's region."""
    model, x = Mlp(), torch.randn(2, 8)
    for weights, outside in (("fp4:g4", True), ("fp4", False)):
        pipeline = f"raise,quantize{{weights={weights}}},fuse"
        after, _ = Pipeline(pipeline).run(fuseline.capture(model, (x,)), verification="full")
        inside = [n.target for m in after.module.children() if m.meta["kind"] == "linear" for n in m.graph.nodes]
        assert (torch.ops.fuseline.decode.default in inside) != outside
        assert error(after.to_module()(x), quantized(model, (x,), f"weights={weights}")[0].to_module()(x)) < 1e-5
