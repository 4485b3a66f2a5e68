"""nn.TransformerEncoder and nn.MultiheadAttention in evaluation: captured in ops that passes see, equal to eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fuseline
from tests.helpers.models import error, ops

PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "both": {"mask": CAUSAL, "is_causal": True, "src_key_padding_mask": PADDING},
    "additive": {"mask": nn.Transformer.generate_square_subsequent_mask(6), "is_causal": True},
}


class Encoder(nn.Module):
    def __init__(self, norm_first: bool, activation: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first, activation=activation)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, **masks: Any) -> torch.Tensor:
        return self.layers(x, **masks)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor, weights: bool, **masks: Any) -> Any:
        return self.inner(x, x, x, need_weights=weights, **masks)


def jittered(model: nn.Module) -> nn.Module:
    """With biases that are not zero, so that none can be lost unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
@pytest.mark.one_in(5)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("norm_first", "activation"), [(False, "relu"), (True, "gelu")])
def test_encoder(norm_first: bool, activation: str, masks: str) -> None:
    torch.compiler.reset()
    model, x = jittered(Encoder(norm_first, activation)), torch.randn(2, 6, 32)
    expected = model(x, **MASKS[masks])
    fuseline.optimize(model, "raise,quantize{weights=int8,only=nothing,allow_empty}", fullgraph=True)
    assert error(model(x, **MASKS[masks]), expected) < 1e-5
    (compilation,) = fuseline.reports(model)
    names = ops(compilation.captured)
    assert (
        names.count("linear") == 8 and names.count("layer_norm") == 4 and "_transformer_encoder_layer_fwd" not in names
    )
    assert compilation.report["raise"].rules == {"LayerNorm": 4, "Attention": 2}


@torch.no_grad()
@pytest.mark.parametrize("masks", [{}, {"key_padding_mask": PADDING}, {"attn_mask": CAUSAL}])
def test_attention(masks: dict[str, Any]) -> None:
    torch.compiler.reset()
    model, x = jittered(Attention()), torch.randn(2, 6, 32)
    expected = model(x, False, **masks)[0]
    fuseline.optimize(model, "raise,quantize{weights=int8}")
    model(x, False, **masks)
    (compilation,) = fuseline.reports(model)
    assert compilation.report["quantize"].matched == 2 and compilation.report["raise"].rules == {"Attention": 1}
    assert error(compilation.captured.run(compilation.captured.examples)[0], expected) < 1e-5


@torch.no_grad()
def test_attention_that_hands_out_its_weights_stays_one_op() -> None:
    torch.compiler.reset()
    model, x = jittered(Attention()), torch.randn(2, 6, 32)
    expected = model(x, True)
    fuseline.optimize(model, "raise{allow_empty}")
    for after, before in zip(model(x, True), expected, strict=True):
        assert error(after, before) < 1e-6
