"""Executable: a compiled graph finds its inputs and its weights among the caller's flat arguments."""

from __future__ import annotations

import torch

from fuseline.compiler.binder import Binder
from fuseline.compiler.expressions import Constant, Param, Scale
from fuseline.compiler.weights import WeightStore
from fuseline.runtime.executable import Executable


def test_inputs_then_weights_in_the_graphs_order() -> None:
    store = WeightStore()
    doubled = Scale(Param("w"), Constant((2.0,), (1,), torch.float32, "cpu"), 0)
    seen = []
    executable = Executable(
        lambda *given: seen.append(given) or "result", [2, 0], Binder([Param("b"), doubled], {"w": 1, "b": 3}, store)
    )
    w, b = torch.nn.Parameter(torch.tensor([[3.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    assert executable("first", w, "third", b) == "result"
    (given,) = seen
    assert given[:2] == ("third", "first") and given[2] is b and given[3].tolist() == [[6.0]]


def test_each_call_binds_the_parameters_that_it_was_given() -> None:
    executable = Executable(lambda x, w: x * w, [0], Binder([Param("w")], {"w": 1}, WeightStore()))
    for value in (2.0, 5.0):
        assert executable(3.0, torch.tensor(value)).item() == 3 * value
