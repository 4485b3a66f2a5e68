"""Lengths that change from call to call are symbolic from the first capture on; what is fixed stays a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fuseline
from tests.helpers.models import error


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


class Growing(nn.Module):
    """Attention over a cache that is handed in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, ids, cache=None):
        x = self.embed(ids).unsqueeze(1)
        cache = x if cache is None else torch.cat((cache, x), dim=2)
        return self.head(F.scaled_dot_product_attention(x, cache, cache).squeeze(1)), cache


class Store:
    """A cache of a fixed length, which knows it as a Python int."""

    def __init__(self, length: int, batch: int = 1):
        self.length, self.used = length, torch.zeros((), dtype=torch.int64)
        self.keys = torch.zeros(batch, 1, length, 8)


class Allocated(Growing):
    def forward(self, ids, store):
        x = self.embed(ids).unsqueeze(1)
        places = torch.arange(ids.shape[1]) + store.used
        store.used.add_(ids.shape[1])
        store.keys.index_copy_(2, places, x)
        visible = torch.arange(store.length) < store.used
        return self.head(F.scaled_dot_product_attention(x, store.keys, store.keys, visible[None, None, None]))


class SideBySide(nn.Module):
    """Joins two inputs that are no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(12, 4)

    def forward(self, a, b):
        return self.lin(torch.cat((a, b), dim=1))


def symbols(model: nn.Module) -> list[set[str]]:
    """Of each capture, the inputs that have a symbolic size."""
    found = []
    for compilation in fuseline.reports(model):
        values = {n.name: n.meta["val"] for n in compilation.captured.placeholders}
        tensors = {n: v for n, v in values.items() if isinstance(v, torch.Tensor)}
        found.append({n for n, v in tensors.items() if any(isinstance(s, torch.SymInt) for s in v.shape)})
    return found


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 20


@torch.no_grad()
def test_a_growing_cache_takes_two_captures() -> None:
    model = Growing()
    fuseline.optimize(model, "fuse{allow_empty}")
    for prompt in (5, 9, 4):
        cache = reference = None
        for step in (ids(prompt), ids(1), ids(1), ids(1)):
            logits, cache = model(step, cache)
            expected, reference = Growing.forward(model, step, reference)
            assert error(logits, expected) < 1e-6 and error(cache, reference) == 0
    assert len(fuseline.reports(model)) == 2
    prompt, step = symbols(model)
    assert any("ids" in name for name in prompt)
    assert any("cache" in name for name in step) and not any("ids" in name for name in step)


@torch.no_grad()
def test_an_allocated_cache_takes_two_captures() -> None:
    model = fuseline.optimize(Allocated(), "fuse{allow_empty}")
    for length, prompt in ((16, 5), (24, 9), (11, 4)):
        store, reference = Store(length), Store(length)
        for step in (ids(prompt), ids(1), ids(1)):
            assert error(model(step, store), Allocated.forward(model, step, reference)) < 1e-6
        assert torch.equal(store.keys, reference.keys) and store.used == prompt + 2
    assert len(fuseline.reports(model)) == 2


@torch.no_grad()
def test_batch_sizes_cost_two_more_in_all() -> None:
    model = fuseline.optimize(Growing(), "fuse{allow_empty}")
    for batch, length in ((1, 5), (2, 7), (3, 6), (7, 7), (1, 8)):
        logits, cache = model(ids(length, batch))
        expected, reference = Growing.forward(model, ids(length, batch))
        assert error(logits, expected) < 1e-6
        step = ids(1, batch)
        assert error(model(step, cache)[0], Growing.forward(model, step, reference)[0]) < 1e-6
    assert len(fuseline.reports(model)) == 4


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "inputs", "settings"),
    [
        (SideBySide, (torch.randn(3, 5), torch.randn(3, 7)), {}),
        (lambda: nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4)), (ids(6),), {}),
        (Growing, (ids(5), torch.randn(1, 1, 9, 8)), {"dynamic": False}),
    ],
    ids=["joined inputs", "no cache", "dynamic=False"],
)
def test_other_sizes_stay_numbers(kind: Any, inputs: tuple[torch.Tensor, ...], settings: dict[str, Any]) -> None:
    model = fuseline.optimize(kind(), "fuse{allow_empty}", **settings)
    model(*inputs)
    assert symbols(model) == [set()]


def test_training_is_left_alone() -> None:
    model = fuseline.optimize(Growing(), "fuse{allow_empty}")
    model(ids(5), torch.randn(1, 1, 9, 8))[0].sum().backward()
    assert symbols(model) == [set()] and model.head.weight.grad is not None


@torch.no_grad()
def test_the_backend_alone_does_the_same() -> None:
    model = Growing()
    records: list[Any] = []
    compiled = torch.compile(
        model, backend="fuseline", options={"pipeline": "fuse{allow_empty}", "record": records.append}
    )
    for prompt in (5, 9):
        cache = None
        for step in (ids(prompt), ids(1), ids(1)):
            logits, cache = compiled(step, cache)
    assert len(records) == 2


@torch.no_grad()
def test_models_that_share_code_have_captures_of_their_own() -> None:
    """Dynamo gives up on a code object after 8 captures, and runs it in eager without a word to the caller."""
    models = [fuseline.optimize(Growing(), "fuse{allow_empty}") for _ in range(3)]
    for model in models:
        for batch in (1, 2):
            _, cache = model(ids(5, batch))
            model(ids(1, batch), cache)
    assert [len(fuseline.reports(model)) for model in models] == [4] * 3
