"""`fuse-loss`: each spelling of a head and its loss becomes one op with eager's loss and gradients; or a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from fuseline import backend
from fuseline.compiler.errors import FuselineError
from fuseline.compiler.ops import linear_cross_entropy
from fuseline.compiler.pipeline import Pipeline
from fuseline.runtime import linear_cross_entropy as runs
from fuseline.runtime.deferred import Deferred
from tests.helpers.models import error
from tests.passes.raise_helpers import F32, F64, rand, run, traced

FUSE = "fuse-loss{least=0}"
BATCH, LENGTH, HIDDEN, VOCABULARY = 2, 5, 6, 11
Loss = Callable[..., torch.Tensor]


def labels(*shape: int) -> torch.Tensor:
    found = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(3))
    return found.masked_fill(torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.3, -100)


def flat(logits: torch.Tensor) -> torch.Tensor:
    return logits.view(-1, VOCABULARY)


def shifted(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(flat(logits[..., :-1, :].contiguous()), target[..., 1:].reshape(-1))


def padded(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    target = F.pad(target, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(flat(logits.to(F64)), target.view(-1))


SPELLINGS: dict[str, Loss] = {
    "mean": lambda h, w, b, t: F.cross_entropy(flat(F.linear(h, w)), t.view(-1)),
    "bias, sum over a count": lambda h, w, b, t: (
        F.cross_entropy(flat(F.linear(h, w, b)), t.view(-1), reduction="sum") / 7
    ),
    "another index ignored": lambda h, w, b, t: F.cross_entropy(
        flat(F.linear(h, w)), t.view(-1).clamp(min=0), ignore_index=0
    ),
    "logits shifted": lambda h, w, b, t: shifted(F.linear(h, w), t),
    "labels shifted": lambda h, w, b, t: padded(F.linear(h, w), t),
    "scaled": lambda h, w, b, t: F.cross_entropy(flat(F.linear(h, w) / 8.0), t.view(-1)),
    "scaled by a product": lambda h, w, b, t: F.cross_entropy(flat(0.25 * F.linear(h, w)), t.view(-1)),
    "capped": lambda h, w, b, t: F.cross_entropy(flat(torch.tanh(F.linear(h, w) / 3.0) * 3.0), t.view(-1)),
    "scaled and capped": lambda h, w, b, t: F.cross_entropy(
        flat(torch.tanh(F.linear(h, w, b) * 2.0 / 5.0) * 4.0), t.view(-1)
    ),
    "classes second": lambda h, w, b, t: F.cross_entropy(F.linear(h, w).transpose(1, 2), t),
    "classes second, permuted": lambda h, w, b, t: F.cross_entropy(F.linear(h, w).permute(0, 2, 1), t, reduction="sum"),
    "per token": lambda h, w, b, t: F.cross_entropy(flat(F.linear(h, w)), t.view(-1), reduction="none").square().sum(),
    "per token, classes second": lambda h, w, b, t: (
        F.cross_entropy(F.linear(h, w).transpose(1, 2), t, reduction="none").mean(1).exp().sum()
    ),
    "smoothed": lambda h, w, b, t: F.cross_entropy(flat(F.linear(h, w)), t.view(-1), label_smoothing=0.1),
    "weighted": lambda h, w, b, t: F.cross_entropy(
        flat(F.linear(h, w)), t.view(-1), torch.arange(1.0, VOCABULARY + 1, dtype=F64)
    ),
    "weighted, per token": lambda h, w, b, t: F.cross_entropy(
        flat(F.linear(h, w)), t.view(-1), torch.arange(1.0, VOCABULARY + 1, dtype=F64), reduction="none"
    ).sum(),
    "negative log-likelihood": lambda h, w, b, t: F.nll_loss(F.log_softmax(flat(F.linear(h, w)), -1), t.view(-1)),
    "a matrix product": lambda h, w, b, t: F.cross_entropy(flat(h @ w.t()), t.view(-1)),
    "one sequence of several": lambda h, w, b, t: F.cross_entropy(F.linear(h, w)[0], t[0]),
    "flattened": lambda h, w, b, t: F.cross_entropy(F.linear(h, w)[:, :-1].flatten(0, 1), t[:, 1:].flatten()),
    "moved about": lambda h, w, b, t: F.cross_entropy(
        F.linear(h, w).transpose(0, 1).unsqueeze(0).squeeze(0).narrow(0, 1, 3).reshape(6, -1),
        t.transpose(0, 1)[1:4].reshape(-1),
    ),
    "chosen rows": lambda h, w, b, t: F.cross_entropy(
        F.linear(h, w).flatten(0, 1).index_select(0, torch.tensor([7, 0, 0])), t.view(-1)[:3]
    ),
    "all ignored but one": lambda h, w, b, t: F.cross_entropy(
        flat(F.linear(h, w)), torch.full_like(t, -100).view(-1).index_fill(0, torch.tensor([4]), 2)
    ),
    "two losses of two heads": lambda h, w, b, t: (
        F.cross_entropy(flat(F.linear(h, w)), t.view(-1)) + F.cross_entropy(flat(F.linear(2 * h, w)), t.view(-1))
    ),
}  # fmt: skip


class Head(torch.nn.Module):
    """A loss of hidden states; everything that could have a gradient has one."""

    def __init__(self, loss: Loss, dtype: torch.dtype = F64, vocabulary: int = VOCABULARY):
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.inside = torch.nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.weight = torch.nn.Parameter(torch.randn(vocabulary, HIDDEN, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.randn(vocabulary, dtype=dtype))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> Any:
        return self.loss(torch.tanh(self.inside(x)), self.weight, self.bias, target)


def both(
    model: torch.nn.Module, x: torch.Tensor, target: torch.Tensor, pipeline: str = FUSE, verify: str = "full"
) -> float:
    """The largest error of loss and gradients, compiled against eager."""
    torch.compiler.reset()
    backend.recent.clear()
    twin = copy.deepcopy(model)
    twin.compile(backend="fuseline", options={"pipeline": pipeline, "verify": verify})
    errors = []
    results = [each(x, target) for each in (model, twin)]
    for loss in results:
        loss.backward()
    errors.append(error(results[1], results[0]))
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        errors += [error(a.grad, b.grad)] if b.grad is not None else []
    return max(errors)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str) -> None:
    x = rand(BATCH, LENGTH, HIDDEN)
    assert both(Head(SPELLINGS[spelling]), x, labels(BATCH, LENGTH)) < 1e-12
    (compiled,) = backend.recent
    assert compiled.program.training and not compiled.report["fuse-loss"].refused
    targets = [n.target for n in compiled.program.graph.nodes]
    assert targets.count(linear_cross_entropy.overload) == (2 if spelling.startswith("two") else 1)
    widest = [
        n.meta["val"].numel() for n in compiled.program.graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor) and VOCABULARY in n.meta["val"].shape[-2:] and n.op != "get_attr"
    ]  # fmt: skip
    assert max(widest, default=0) <= HIDDEN * VOCABULARY  # no logits


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_in_inference_and_by_chunks(spelling: str) -> None:
    inputs = rand(BATCH, LENGTH, HIDDEN), rand(VOCABULARY, HIDDEN), rand(VOCABULARY), labels(BATCH, LENGTH)
    program = traced(SPELLINGS[spelling], *inputs)
    after, report = Pipeline("fuse-loss{least=0,chunk=3}").run(program, verification="full")
    assert report["fuse-loss"].rules["LinearCrossEntropy"] and not report["fuse-loss"].refused
    assert error(run(after), run(program)) < 1e-13


def test_nothing_counts() -> None:
    """A mean over nothing is NaN and its gradients are zero, a sum is zero."""
    for reduction in ("mean", "sum"):
        loss = lambda h, w, b, t, how=reduction: F.cross_entropy(flat(F.linear(h, w)), t.view(-1), reduction=how)
        model = Head(loss)
        twin = copy.deepcopy(model)
        torch.compiler.reset()
        twin.compile(backend="fuseline", options={"pipeline": FUSE})
        target = torch.full((BATCH, LENGTH), -100)
        results = [each(rand(BATCH, LENGTH, HIDDEN), target) for each in (model, twin)]
        assert all(r.isnan() if reduction == "mean" else r == 0 for r in results)
        for result in results:
            result.backward()
        for a, b in zip(twin.parameters(), model.parameters(), strict=True):
            assert (a.grad is None and b.grad is None) or (not a.grad.any() and not b.grad.any())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sizes_and_any_labels(data: st.DataObject) -> None:
    draw = data.draw
    n, h, v = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.integers(2, 70))
    ignore = draw(st.sampled_from([-100, 0, v - 1]))
    target = torch.tensor(draw(st.lists(st.one_of(st.integers(0, v - 1), st.just(ignore)), min_size=n, max_size=n)))
    reduction, chunk = draw(st.integers(0, 2)), draw(st.integers(0, 10))
    smoothing, cap = draw(st.sampled_from([0.0, 0.2])), draw(st.sampled_from([0.0, 2.5, -4.0]))
    scale = draw(st.sampled_from([1.0, 0.3, -1.5]))
    x, w, b = (rand(*s, seed=n).requires_grad_() for s in ((n, h), (v, h), (v,)))
    bias = b if draw(st.booleans()) else None
    classes = rand(v, seed=1).abs() + 0.1 if not smoothing and draw(st.booleans()) else None
    arguments = (x, w, bias, target, classes, reduction, ignore, smoothing, scale, cap, None, chunk)
    found, expected = linear_cross_entropy(*arguments), linear_cross_entropy.naive(*arguments)
    assert torch.equal(found.isnan(), expected.isnan())
    assert error(found.nan_to_num(), expected.nan_to_num()) < 1e-12
    wanted = [t for t in (x, w, bias) if t is not None]
    above = rand(*expected.shape, seed=2)
    pairs = zip(*(torch.autograd.grad(r, wanted, above) for r in (found, expected)), strict=True)
    assert max((a - e).abs().max().item() for a, e in pairs) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_errors_are_at_most_eagers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = (torch.randn(64, 32).to(dtype).requires_grad_(), torch.randn(500, 32).to(dtype).requires_grad_())
    target = torch.randint(0, 500, (64,))
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    reference = F.cross_entropy(F.linear(*exact), target)
    eager = F.cross_entropy(F.linear(x, w).float(), target)
    ours = linear_cross_entropy(x, w, None, target, None, 1, -100, 0.0, 1.0, 0.0, F32, 16)
    assert ours.dtype == eager.dtype == F32
    assert abs(ours.double() - reference) <= abs(eager.double() - reference) + 1e-6
    factor = 1.7  # an odd upstream gradient: the gradients that are stored are not rounded yet
    expected = torch.autograd.grad(factor * reference, exact)
    for tensor, truth in zip((x, w), expected, strict=True):
        (a,) = torch.autograd.grad(factor * ours, [tensor], retain_graph=True)
        (b,) = torch.autograd.grad(factor * eager, [tensor], retain_graph=True)
        assert a.dtype == dtype
        norm = lambda g, t=truth: (g.double() - t).norm() / t.norm()
        assert norm(a) <= 1.02 * norm(b)


def test_used_twice_and_under_another_gradient() -> None:
    x, w = rand(4, HIDDEN).requires_grad_(), rand(VOCABULARY, HIDDEN).requires_grad_()
    target = labels(4)
    loss = lambda op: op(x, w, None, target, None)
    once = torch.autograd.grad(loss(linear_cross_entropy.naive), [x, w])
    kept = loss(linear_cross_entropy)
    for factor in (1.0, -2.5):
        found = torch.autograd.grad(factor * kept + kept * kept.detach(), [x, w], retain_graph=True)
        assert all(error(a, (factor + kept.item()) * b) < 1e-12 for a, b in zip(found, once, strict=True))


def test_only_what_wants_a_gradient_costs_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(runs, "_add_product", lambda total, a, b: made.append(tuple(total.shape)))
    x, w = rand(4, HIDDEN).requires_grad_(), rand(VOCABULARY, HIDDEN)
    linear_cross_entropy(x, w, None, labels(4), None).backward()
    assert x.grad is not None and not made  # the head is frozen
    with torch.no_grad():
        linear_cross_entropy(x, w.requires_grad_(), None, labels(4), None)
    assert not made


def test_second_derivatives_are_refused() -> None:
    x, w = rand(4, HIDDEN).requires_grad_(), rand(VOCABULARY, HIDDEN)
    loss = linear_cross_entropy(x, w, None, labels(4), None)
    with pytest.raises(FuselineError, match="a fused loss has no second derivatives"):
        torch.autograd.grad(loss, [x], create_graph=True)


def test_a_label_out_of_range_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"a target is neither in 0 … 10 nor -100"):
        linear_cross_entropy(rand(2, HIDDEN), rand(VOCABULARY, HIDDEN), None, torch.tensor([1, VOCABULARY]), None)
    with pytest.raises(FuselineError, match="label smoothing or class weights, not both"):
        linear_cross_entropy(
            rand(2, HIDDEN), rand(VOCABULARY, HIDDEN), None, labels(2), torch.ones(VOCABULARY), 1, -100, 0.1
        )


def test_autocast_around_and_inside() -> None:
    """Under autocast the head works in bfloat16: the op is given what autocast would have cast."""
    model = Head(SPELLINGS["labels shifted"], F32)
    inside = Head(SPELLINGS["mean"], F32)
    loss = inside.loss

    def casting(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(h, w, b, t)

    inside.loss = casting
    x, target = rand(BATCH, LENGTH, HIDDEN, dtype=F32), labels(BATCH, LENGTH)
    assert both(inside, x, target, verify="quick") < 2e-2
    assert backend.recent[0].report["fuse-loss"].rules == {"LinearCrossEntropy": 1}
    with torch.autocast("cpu", torch.bfloat16):
        assert both(model, x, target, verify="quick") < 2e-2
    assert backend.recent[0].report["fuse-loss"].rules == {"LinearCrossEntropy": 1}


# -- refusals ---------------------------------------------------------------------------------------------------------


def noted(loss: Loss) -> torch.Tensor:
    with torch.no_grad():
        return loss()


REFUSALS: dict[str, Loss] = {
    "the logits are also read by logsumexp": lambda h, w, b, t: (
        lambda z: F.cross_entropy(flat(z), t.view(-1)) + z.logsumexp(-1).square().mean()
    )(F.linear(h, w)),
    "the logits are scaled by a tensor": lambda h, w, b, t: F.cross_entropy(flat(F.linear(h, w) * b[0]), t.view(-1)),
    "the logits pass through relu": lambda h, w, b, t: F.cross_entropy(flat(F.linear(h, w).relu()), t.view(-1)),
    "the targets are probabilities": lambda h, w, b, t: F.cross_entropy(
        flat(F.linear(h, w)), F.one_hot(t.view(-1).clamp(min=0), VOCABULARY).to(F64)
    ),
    "label smoothing and class weights together": lambda h, w, b, t: F.cross_entropy(
        flat(F.linear(h, w)), t.view(-1), torch.ones(VOCABULARY, dtype=F64), label_smoothing=0.1
    ),
    "the logits are cast more than once": lambda h, w, b, t: F.cross_entropy(
        flat(F.linear(h, w).float().half().float()), t.view(-1)
    ),
    "the classes lie in dimension 1": lambda h, w, b, t: F.cross_entropy(F.linear(h, w), t[:, :1].expand(-1, 11) * 0),
    "part of it runs under torch.no_grad": lambda h, w, b, t: F.cross_entropy(
        flat(noted(lambda: F.linear(h, w))), t.view(-1)
    ) + h.sum(),
    "the loss is of one token without a batch dimension": lambda h, w, b, t: F.cross_entropy(
        F.linear(h, w)[0, 0], t[0, 1]
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals(reason: str) -> None:
    model = Head(REFUSALS[reason])
    assert both(model, rand(BATCH, LENGTH, HIDDEN), labels(BATCH, LENGTH), "fuse-loss{least=0,allow_empty}") < 1e-12
    found = backend.recent[0].report["fuse-loss"].refused.values()
    assert any(reason in why for why in found), found
    assert not any(n.target is linear_cross_entropy.overload for n in backend.recent[0].program.graph.nodes)


def test_a_small_vocabulary_stays_and_a_pass_without_a_loss_is_an_error() -> None:
    model, x, target = Head(SPELLINGS["mean"]), rand(BATCH, LENGTH, HIDDEN), labels(BATCH, LENGTH)
    with pytest.raises(Exception, match="the vocabulary has 11 tokens: below 4096 the logits are stored at a low cost"):
        both(model, x, target, "fuse-loss")
    with pytest.raises(Exception, match="the program computes no cross-entropy of a linear layer's result"):
        both(Head(lambda h, w, b, t: h.sum()), x, target, "fuse-loss")


# -- logits that the model returns ------------------------------------------------------------------------------------


class Returning(Head):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> Any:
        logits = F.linear(torch.tanh(self.inside(x)), self.weight, self.bias) * 0.5
        return F.cross_entropy(flat(logits), target.view(-1)), logits


def compiled(model: torch.nn.Module, pipeline: str = FUSE) -> torch.nn.Module:
    torch.compiler.reset()
    backend.recent.clear()
    model.compile(backend="fuseline", options={"pipeline": pipeline})
    return model


def test_returned_logits_are_computed_when_they_are_read() -> None:
    x, target = rand(BATCH, LENGTH, HIDDEN), labels(BATCH, LENGTH)
    model = Returning(SPELLINGS["mean"])
    loss, logits = model(x, target)
    expected = torch.autograd.grad(loss + logits.square().mean(), list(model.parameters()))
    ours, later = compiled(model)(x, target)
    assert isinstance(later, Deferred) and later._value is None
    assert (later.shape, later.dtype, later.device, later.requires_grad) == (logits.shape, F64, x.device, True)
    assert later._value is None  # what is known beforehand costs nothing
    assert error(ours, loss) < 1e-12 and error(later, logits) < 1e-12
    found = torch.autograd.grad(ours + later.square().mean(), list(model.parameters()))
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-12


def test_logits_can_be_kept() -> None:
    x, target = rand(BATCH, LENGTH, HIDDEN), labels(BATCH, LENGTH)
    model = compiled(Returning(SPELLINGS["mean"]), "fuse-loss{least=0,logits=kept,allow_empty}")
    assert type(model(x, target)[1]) is torch.Tensor
    (why,) = backend.recent[0].report["fuse-loss"].refused.values()
    assert why.startswith("the logits are returned to the caller, and kept")
    model = compiled(Returning(SPELLINGS["mean"]), "fuse-loss{least=0,allow_empty}")
    with torch.no_grad():
        assert type(model(x, target)[1]) is torch.Tensor
    assert list(backend.recent[0].report["fuse-loss"].refused.values()) == ["the logits are returned to the caller"]


def test_what_cannot_be_computed_later_is_kept() -> None:
    """Logits of a weight that the graph makes, or in another shape, or without gradients."""

    class Doubled(Returning):
        def forward(self, x: torch.Tensor, target: torch.Tensor) -> Any:
            logits = F.linear(torch.tanh(self.inside(x)), self.weight * 2)
            return F.cross_entropy(flat(logits), target.view(-1)), logits

    class Turned(Returning):
        def forward(self, x: torch.Tensor, target: torch.Tensor) -> Any:
            logits = F.linear(torch.tanh(self.inside(x)), self.weight)
            return F.cross_entropy(flat(logits), target.view(-1)), logits.transpose(0, 1)

    class Watched(Returning):
        def forward(self, x: torch.Tensor, target: torch.Tensor) -> Any:
            h = torch.tanh(self.inside(x))
            with torch.no_grad():
                logits = F.linear(h, self.weight)
                loss = F.cross_entropy(flat(logits), target.view(-1))
            return h.sum() + loss, logits

    reasons = {
        Doubled: "the logits are returned, and are no linear layer of a parameter followed by numbers and casts",
        Turned: "the logits are also read by transpose",
        Watched: "the logits are returned to the caller, and computed without gradients",
    }
    x, target = rand(BATCH, LENGTH, HIDDEN), labels(BATCH, LENGTH)
    for kind, reason in reasons.items():
        model = kind(SPELLINGS["mean"])
        loss, logits = model(x, target)
        found, kept = compiled(model, "fuse-loss{least=0,allow_empty}")(x, target)
        assert error(found, loss) < 1e-12 and error(kept, logits) < 1e-12 and type(kept) is torch.Tensor
        (why,) = backend.recent[0].report["fuse-loss"].refused.values()
        assert why.startswith(reason)
