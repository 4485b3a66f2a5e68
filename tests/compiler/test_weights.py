"""The weight store and the binder: computed once, shared, noticed when stale, dropped with the parameter."""

from __future__ import annotations

import gc

import numpy
import pytest
import torch
from torch.nn import Parameter

from fuseline.compiler.binder import Binder, refresh
from fuseline.compiler.errors import UserError
from fuseline.compiler.expressions import Cast, Concat, Constant, Output, Pack, Param, Quantize, Scale, Slice, Transpose
from fuseline.compiler.schemes import Scheme
from fuseline.compiler.weights import WeightStore

W, B = Param("w"), Param("b")
DOUBLED = Scale(W, Constant((2.0,), (1,), torch.float32, "cpu"), 0)


def row(*values: float) -> Parameter:
    return Parameter(torch.tensor([values], dtype=torch.float32), requires_grad=False)


def counts(store: WeightStore) -> tuple[int, int]:
    return store.hits, store.misses


def test_an_expression_is_evaluated_once() -> None:
    store, w = WeightStore(), row(1, 2)
    first = store.get(DOUBLED, [w])
    assert first.tolist() == [[2, 4]]
    assert store.get(DOUBLED, [w]) is first
    assert counts(store) == (1, 1)


def test_names_do_not_matter_so_graphs_share() -> None:
    store, w = WeightStore(), row(1, 2)
    first = store.get(DOUBLED, [w])
    assert store.get(DOUBLED.rename({"w": "layers.0.w"}), [w]) is first


def test_a_parameter_unchanged_is_handed_through() -> None:
    store, w = WeightStore(), row(1, 2)
    assert store.get(W, [w]) is w
    assert counts(store) == (0, 0)


def test_an_edit_in_place_is_noticed() -> None:
    store, w = WeightStore(), row(1, 2)
    store.get(DOUBLED, [w])
    w.mul_(10)
    assert store.get(DOUBLED, [w]).tolist() == [[20, 40]]
    assert counts(store) == (0, 2)


def test_new_storage_behind_the_same_parameter_is_noticed() -> None:
    store, w = WeightStore(), row(1, 2)
    store.get(DOUBLED, [w])
    w.data = torch.tensor([[3.0, 4.0]])
    assert store.get(DOUBLED, [w]).tolist() == [[6, 8]]


def test_other_memory_at_the_same_address_is_noticed() -> None:
    """As after `p.data = p.data * 2`, twice, where the second product lies where the first value did."""
    memory = numpy.full((1, 2), 3.0, numpy.float32)  # what the allocator hands out again
    store, w = WeightStore(), Parameter(torch.from_numpy(memory), requires_grad=False)
    binder = Binder([DOUBLED], {"w": 0}, store)
    first, state = store.get(DOUBLED, [w]), (w.data_ptr(), w._version)
    (bound,) = binder([w])
    assert first.tolist() == [[6, 6]] and bound is first
    w.data = w.data * 2
    memory[:] = 12
    w.data = torch.from_numpy(memory)
    assert (w.data_ptr(), w._version) == state, "neither tells"
    assert store.get(DOUBLED, [w]).tolist() == [[24, 24]] and binder([w])[0].tolist() == [[24, 24]]


def test_a_bound_lives_as_long_as_its_memory() -> None:
    store, w = WeightStore(), row(1, 2)
    binder = Binder([DOUBLED], {"w": 0}, store)
    bound = binder.bound_to([w])
    gc.collect()
    assert binder.bound_to([w]) is bound
    old, w.data = w.data, torch.ones(1, 2)
    assert binder.bound, "the old memory is held"
    del old
    assert not binder.bound, "and nothing else asks for its values"


def test_an_edit_through_data_needs_refresh() -> None:
    store, w = WeightStore(), row(1, 2)
    store.get(DOUBLED, [w])
    w.data.copy_(torch.tensor([[3.0, 4.0]]))
    assert store.get(DOUBLED, [w]).tolist() == [[2, 4]]  # PyTorch gives no sign of such an edit
    store.forget([w])
    assert store.get(DOUBLED, [w]).tolist() == [[6, 8]]


def test_another_parameter_is_another_entry() -> None:
    store = WeightStore()
    assert store.get(DOUBLED, [row(1)]).tolist() == [[2]]
    assert store.get(DOUBLED, [row(5)]).tolist() == [[10]]


def test_a_value_dies_with_its_parameter() -> None:
    store, w = WeightStore(), row(1, 2, 3, 4)
    store.get(DOUBLED, [w])
    assert store.bytes() == 16
    del w
    gc.collect()
    assert store.bytes() == 0


@pytest.mark.parametrize("alias", [Cast(W, torch.float32), Slice(W, 0, 0, 1), Transpose(W, 0, 0)])
def test_a_value_that_would_be_a_view_keeps_no_parameter_alive(alias) -> None:
    store, w = WeightStore(), row(1, 2)
    assert store.get(alias, [w]).tolist() == [[1, 2]]
    del w
    gc.collect()
    assert store.bytes() == 0


def test_expressions_over_several_parameters() -> None:
    store, first, second = WeightStore(), row(1), row(2)
    both = Concat((W, B), 0)
    assert store.get(both, [first, second]).tolist() == [[1], [2]]
    assert store.get(both, [first, row(7)]).tolist() == [[1], [7]]
    second.fill_(9)
    assert store.get(both, [first, second]).tolist() == [[1], [9]]
    hits = store.hits
    store.get(both, [first, second])
    assert store.hits == hits + 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_is_named(bad: float) -> None:
    w = row(1, bad, bad)
    with pytest.raises(UserError) as caught:
        WeightStore().get(DOUBLED.rename({"w": "model.layers.3.up.weight"}), [w])
    text = str(caught.value)
    assert "weight 'model.layers.3.up.weight' holds NaN or infinite values" in text
    assert "shape (1, 3), 2 of them" in text
    assert caught.value.exit_code == 2


def test_inference_tensors_have_no_version_and_work() -> None:
    with torch.inference_mode():
        w = torch.ones(1, 2)
    assert WeightStore().get(DOUBLED, [w]).tolist() == [[2, 2]]


def binder(*expressions) -> tuple[Binder, WeightStore]:
    store = WeightStore()
    return Binder(expressions, {"w": 0, "b": 2}, store), store


def test_the_binder_reads_the_tensors_of_this_call() -> None:
    bind, _ = binder(W, DOUBLED, Constant((7.0,), (1,), torch.float32, "cpu"), B)
    for w, b in ((row(1), row(2)), (row(3), row(4))):
        plain, derived, constant, other = bind([w, "an activation", b])
        assert plain is w and other is b
        assert derived.tolist() == [[w.item() * 2]] and constant.tolist() == [7]


def test_a_second_call_asks_the_store_for_nothing() -> None:
    bind, store = binder(DOUBLED)
    w = row(1)
    bind([w, None, None])
    asked = counts(store)
    bind([w, None, None])
    assert counts(store) == asked


def test_the_binder_notices_replacement_edits_and_refresh() -> None:
    bind, store = binder(DOUBLED)
    w = row(1)
    assert bind([w])[0].item() == 2
    w.add_(1)
    assert bind([w])[0].item() == 4
    assert bind([row(5)])[0].item() == 10
    w.data.fill_(7)
    assert bind([w])[0].item() == 4
    store.forget([w])
    refresh()
    assert bind([w])[0].item() == 14


def test_the_binder_forgets_parameters_that_died() -> None:
    bind, store = binder(DOUBLED)
    for value in range(5):
        bind([row(value)])
    gc.collect()
    assert not bind.bound and store.bytes() == 0


def test_one_quantization_serves_codes_scale_and_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme("int4", 2, False)
    quantized = Quantize(W, scheme)
    calls = []
    original = Scheme.quantize
    monkeypatch.setattr(Scheme, "quantize", lambda self, w: calls.append(1) or original(self, w))
    bind, _ = binder(Pack(Output(quantized, "codes"), scheme), Output(quantized, "scale"), Output(quantized, "zero"))
    codes, scale, zero = bind([row(1, 2, 3, 4)])
    assert (codes.dtype, scale.shape, zero.dtype) == (torch.uint8, (1, 2), torch.uint8)
    assert len(calls) == 1
