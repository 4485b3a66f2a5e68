"""query-key: logits of one matrix a head, exactly; what stands in between is a refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fuseline
from fuseline import Pipeline, UserError
from fuseline.compiler.errors import EmptyPassError
from fuseline.compiler.expressions import Concat
from fuseline.models.decoder import TinyDecoder
from fuseline.qat import ConfidenceAnnealing

CHANNELS, HEADS, WIDTH = 12, 4, 5


class Attention(nn.Module):
    """Of x over y; `between` is what stands between the products and attention."""

    def __init__(self, keys: int = HEADS, bias: bool = True, joint: bool = False, other: int = CHANNELS):
        super().__init__()
        self.groups, self.sizes = HEADS // keys, [HEADS * WIDTH, keys * WIDTH, keys * WIDTH]
        self.joint = nn.Linear(CHANNELS, sum(self.sizes), bias) if joint else None
        for name, size, width in zip("qkv", self.sizes, (CHANNELS, other, other), strict=True):
            setattr(self, name, None if joint else nn.Linear(width, size, bias))
        self.norm, self.o = nn.LayerNorm(CHANNELS), nn.Linear(HEADS * WIDTH, CHANNELS)
        self.factor, self.between = 1.0, lambda q, k: (q, k)
        self.options: dict[str, Any] = {}

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        h = self.norm(x)
        y = h if y is None else y
        parts = (self.q(h), self.k(y), self.v(y)) if self.joint is None else self.joint(h).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for part in parts)
        q, k = self.between(q * self.factor, k)
        k, v = (part.repeat_interleave(self.groups, 1) if self.groups > 1 else part for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, **self.options)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


def made(**settings: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(**settings).double()


def inputs(*widths: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(2, 3 + i, width, dtype=torch.float64) for i, width in enumerate(widths))


def rewritten(model: nn.Module, *x: torch.Tensor, text: str = "raise,query-key") -> tuple[Any, torch.Tensor, Any]:
    program = fuseline.capture(model, x)
    after, report = Pipeline(text).run(program, verification="full")
    return after, after.run(after.examples)[0], report["query-key"]


def causal(model: Attention) -> Attention:
    model.options["is_causal"] = True
    return model


def scaled(model: Attention) -> Attention:
    model.factor, model.options["scale"] = 0.3, 0.7
    return model


CASES: dict[str, tuple[Callable[[], Attention], tuple[int, ...]]] = {
    "self": (made, (CHANNELS,)),
    "no bias": (lambda: made(bias=False), (CHANNELS,)),
    "causal, shared key heads": (lambda: causal(made(keys=2)), (CHANNELS,)),
    "one product": (lambda: made(joint=True, keys=1), (CHANNELS,)),
    "cross": (lambda: made(other=7), (CHANNELS, 7)),
    "factors": (lambda: scaled(made()), (CHANNELS,)),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_same(name: str) -> None:
    build, widths = CASES[name]
    model, x = build(), inputs(*widths)
    wanted = model(*x)
    after, found, report = rewritten(model, *x)
    assert report.matched == 1 and not report.refused
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    merged = [n for n in after.weights() if isinstance(n.meta["weight"], Concat) and n.meta["val"].dim() == 2]
    assert [tuple(n.meta["val"].shape) for n in merged] == [(HEADS * widths[-1], CHANNELS)]
    left = {name for node in after.weights() for name in node.meta["weight"].parameters()}
    assert "k.bias" not in left  # the softmax takes it out


def test_gradients_reach_both_weights_exactly() -> None:
    """One linear is rounded, so that there is something to train for; the rest computes as before, in float64."""
    x, found = inputs(CHANNELS), []
    for text in ("raise,quantize{weights=int8,only=o}", "raise,query-key,quantize{weights=int8,only=o}"):
        model = made(keys=2)
        qat = fuseline.prepare_qat(model, text, x)
        qat(*x).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    wanted, merged = found
    assert wanted["k.bias"].abs().max() < 1e-12 and merged["k.bias"] is None  # the softmax takes it out
    for name in set(wanted) - {"k.bias"}:
        assert (merged[name] - wanted[name]).abs().max() <= 1e-12 * wanted[name].abs().max(), name


def test_weights_that_want_a_gradient_are_left_outside_of_prepare_qat() -> None:
    model, x = made(), inputs(CHANNELS)
    compiled = torch.compile(model, backend="fuseline", options={"pipeline": "raise,query-key"})
    with pytest.raises(Exception, match="their weights want gradients") as caught:
        compiled(*x)
    assert "fuseline.prepare_qat" in str(caught.value)
    torch._dynamo.reset()
    with torch.no_grad():
        assert (compiled(*x) - model(*x)).abs().max() < 1e-12


def normed(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.rms_norm(q, (WIDTH,)), k


def cached(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q, torch.cat((torch.zeros_like(k), k), 2)[:, :, k.shape[2] :]


def shared(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q + k.mean(), k


@pytest.mark.parametrize(
    "between, reason",
    [
        (normed, "a norm stands between"),
        (cached, "keys.*only views by head and factors may"),
        (shared, "only views by head and factors may, no rotary embedding or norm"),
        (lambda q, k: (q, k.tanh()), "between the product that makes keys and attention stands aten.tanh"),
        (lambda q, k: (q.transpose(2, 3).reshape(q.shape), k), "queries and attention stands aten"),
    ],
)
def test_what_stands_between_is_a_refusal(between: Callable[..., Any], reason: str) -> None:
    model = made()
    model.between = between
    with pytest.raises(EmptyPassError, match="matched no site") as caught:
        rewritten(model, *inputs(CHANNELS))
    assert any(re.search(reason, line) for line in caught.value.details), caught.value.details


def test_rotary_embeddings_are_a_refusal() -> None:
    torch.manual_seed(0)
    model, ids = TinyDecoder(48, 32, 1, 4, 2), torch.arange(8).view(1, 8)
    with pytest.raises(EmptyPassError) as caught:
        rewritten(model, ids)
    assert any("a rotary embedding turns queries by their position" in line for line in caught.value.details)


def test_keys_that_something_else_reads_and_soft_capping() -> None:
    class Both(Attention):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            out = super().forward(x)
            return out, self.k(self.norm(x))

    model = Both().double()
    program = fuseline.capture(model, inputs(CHANNELS))
    after, report = Pipeline("raise,query-key").run(program)  # two calls of one product: only one is attention's
    assert report["query-key"].matched == 1

    class Capped(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            q, k, v = (part(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for part in (self.q, self.k, self.v))
            logits = 3.0 * torch.tanh(q @ k.transpose(-1, -2) * 0.4 / 3.0)
            return self.o((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    with pytest.raises(EmptyPassError) as caught:
        rewritten(Capped().double(), *inputs(CHANNELS))
    assert any("but not through soft-capping" in line for line in caught.value.details)
    model, x = Capped(bias=False).double(), inputs(CHANNELS)
    assert (rewritten(model, *x)[1] - model(*x)).abs().max() < 1e-12


TRAINED = "raise,query-key,quantize{weights=midrise2,activations=int8,keys=int8}"


def train(qat: nn.Module, optimizer: Any, x: torch.Tensor, wanted: torch.Tensor, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(qat(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("text", [TRAINED, TRAINED.replace("weights=midrise2", "weights=ternary,method=paretoq")])
def test_training_rounds_the_product_and_convert_gives_it_back(text: str) -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(4, 6, CHANNELS)
    wanted = model(x).detach()
    qat = fuseline.prepare_qat(model, text, (x,))
    shapes = [tuple(qat.weight(one).shape) for one in qat.rounded]
    assert sorted(shapes) == sorted(
        [(HEADS * CHANNELS, CHANNELS), (HEADS * WIDTH, CHANNELS), (CHANNELS, HEADS * WIDTH)]
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(qat, torch.optim.AdamW(qat.parameters(), 3e-3, weight_decay=0.0), x, wanted, 20)
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(before["q.weight"], model.q.weight) and not torch.equal(before["k.weight"], model.k.weight)
    with torch.no_grad():
        trained = qat.eval()(x)
        found = fuseline.convert(qat, target="eager")(x)
    assert (found - trained).abs().max() <= 1e-5 * trained.abs().max()


def test_annealing_takes_the_gradients_of_unsure_elements_alone() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 6, CHANNELS)
    qat = fuseline.prepare_qat(model, "raise,query-key,quantize{weights=midrise2}", (x,))
    merged = next(one for one in qat.rounded if qat.is_computed(one))
    train(qat, torch.optim.SGD(qat.parameters(), 0.0), x, torch.zeros_like(x), 1)
    plain = model.q.weight.grad.clone()
    seen: list[torch.Tensor] = []
    annealing = ConfidenceAnnealing(torch.optim.SGD(qat.parameters(), 0.1), qat, boundary=0.05)
    masked = qat.gradients[merged.one.weight]
    qat.gradients[merged.one.weight] = lambda w, g: seen.append((g, made := masked(w, g))) or made  # type: ignore[func-returns-value]
    train(qat, annealing, x, torch.zeros_like(x), 1)
    ((given, left),) = seen
    unsure = annealing.unsure(merged, qat.weight(merged).detach())
    assert 0 < (left != 0).float().mean() < 0.3 and torch.equal(left[left != 0], given[left != 0])
    assert model.q.weight.grad.abs().sum() < plain.abs().sum() and unsure.shape == left.shape
    with pytest.raises(UserError, match="is computed from"):
        qat.editable(merged)


def test_heads_may_be_left() -> None:
    model = made()
    with pytest.raises(EmptyPassError):
        rewritten(model, *inputs(CHANNELS), text="raise,query-key{skip=q}")
    assert rewritten(model, *inputs(CHANNELS), text="raise,query-key{only=q}")[2].matched == 1


@pytest.mark.slow
@pytest.mark.parametrize("family, attentions", [("vit", 1), ("bart", 3)])
def test_models_of_transformers(family: str, attentions: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
        model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=4))
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    else:
        both = ("layers", "attention_heads", "ffn_dim")
        sizes = {
            f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in zip(both, (1, 4, 64), strict=True)
        }
        model = transformers.BartModel(transformers.BartConfig(d_model=32, vocab_size=50, use_cache=False, **sizes))
        x = torch.randint(0, 50, (2, 7))
    model = model.double().eval()
    program = fuseline.capture(model, (x,))
    after, report = Pipeline("raise,query-key").run(program)
    assert report["query-key"].matched == attentions and not report["query-key"].refused
    wanted, found = (p.run(p.examples)[0] for p in (program, after))
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
