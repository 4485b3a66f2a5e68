"""What is looked at before a replay: in C++, and the same in Python."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from fuseline.runtime import native, watch as module
from fuseline.runtime.watch import Watch, in_cpp, in_python, watch

LOOPS = {"C++": in_cpp, "Python": in_python}


@pytest.fixture(params=LOOPS)
def make(request: pytest.FixtureRequest) -> Callable[..., Watch]:
    return LOOPS[request.param]


def arguments() -> tuple[object, ...]:
    """Positions: 0 a number, 1 a parameter with a version, 2 another read in place, 3 a cache, 4 not looked at."""
    w = Parameter(torch.ones(4))
    with torch.no_grad():
        w.mul_(3)
    return 7, w, Parameter(torch.ones(4), requires_grad=False), torch.zeros(8), torch.zeros(2)


def watched(make: Callable[..., Watch]) -> tuple[list[object], Watch]:
    values = arguments()
    same = make(values, [1, 2, 3], [1])
    assert same(values)
    return list(values), same


def test_there_is_a_compiler_here() -> None:
    """Else the tests of the C++ part would test nothing."""
    assert native.module("watch") is not None and type(watch(arguments(), [1], [1])).__name__ != "function"


def test_other_tensors_of_the_same_memory_and_whatever_is_not_watched(make: Callable[..., Watch]) -> None:
    values, same = watched(make)
    others = [8, values[1].detach(), values[2].detach(), values[3].view(2, 4), torch.ones(3)]
    assert same(tuple(others))


@torch.no_grad()
def test_an_edit_is_seen_where_the_version_counts_and_only_there(make: Callable[..., Watch]) -> None:
    values, same = watched(make)
    values[2].mul_(2)
    values[3].add_(1)
    assert same(tuple(values)), "read where they lie"
    values[1].mul_(2)
    assert not same(tuple(values))


def test_an_edit_through_a_view_and_one_back_again(make: Callable[..., Watch]) -> None:
    values, same = watched(make)
    part = values[1].detach()[1:2]
    part.add_(1)
    part.sub_(1)
    assert not same(tuple(values))


@pytest.mark.parametrize("position", [1, 2, 3])
def test_what_was_moved_or_replaced_is_seen(make: Callable[..., Watch], position: int) -> None:
    values, same = watched(make)
    kept = values[position].data
    version = values[position]._version
    values[position].data = kept.clone()
    assert values[position]._version == version and not same(tuple(values)), "no version tells"
    values[position].data = kept
    assert same(tuple(values)), "back where it was"
    values[position] = Parameter(kept.clone(), requires_grad=False)
    assert not same(tuple(values))


def test_exchanged_freed_and_resized(make: Callable[..., Watch]) -> None:
    values, same = watched(make)
    assert not same((values[0], values[2], values[1], *values[3:]))
    torch.utils.swap_tensors(values[1], values[2])
    assert not same(tuple(values))
    torch.utils.swap_tensors(values[1], values[2])
    assert same(tuple(values))
    values[3].untyped_storage().resize_(0)
    assert not same(tuple(values))


def test_moved_by_a_module(make: Callable[..., Watch]) -> None:
    linear = torch.nn.Linear(4, 4)
    for parameter in linear.parameters():
        parameter.requires_grad_(False)
    same = make(tuple(linear.parameters()), [0, 1], [0])
    assert same(tuple(linear.parameters()))
    linear.to(torch.float64)
    assert not same(tuple(linear.parameters()))


def test_every_position_counts(make: Callable[..., Watch]) -> None:
    values = tuple(Parameter(torch.zeros(3), requires_grad=False) for _ in range(40))
    same = make(values, range(40), range(0, 40, 2))
    for i in range(40):
        assert not same((*values[:i], torch.zeros(3), *values[i + 1 :]))
    for i in range(1, 40, 2):
        values[i].add_(1)
    assert same(values)
    values[38].add_(1)
    assert not same(values)


def test_the_watch_keeps_nothing_alive(make: Callable[..., Watch]) -> None:
    values = arguments()
    same = make(values, [1, 2, 3], [1])
    counts = [sys.getrefcount(x) for x in values]
    for _ in range(1000):
        same(values)
    assert [sys.getrefcount(x) for x in values] == counts
    alive = weakref.ref(values[1])
    del values
    gc.collect()
    assert alive() is None


def test_inference_tensors_have_no_versions() -> None:
    with torch.inference_mode():
        w, other = torch.ones(3), torch.ones(3)
    same = watch((w,), [0], [0])
    assert same((w,)) and not same((other,))


def test_anything_else_is_another_call_in_cpp() -> None:
    values, same = watched(in_cpp)
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError):
        sparse.data_ptr()
    for strange in (sparse, None, 3, "w", object(), torch.zeros(3, device="meta"), _Own(torch.zeros(3))):
        assert same((values[0], strange, *values[2:])) is False
    assert same(tuple(values[:-1])) is False and same(values) is False and same(None) is False
    assert same(tuple(values))


class _Own(torch.Tensor):
    """A class of its own may read its address otherwise."""


def test_classes_of_their_own_are_looked_at_in_python() -> None:
    values = (torch.zeros(3).as_subclass(_Own),)
    assert in_cpp(values, [0], []) is None
    same = watch(values, [0], [0])
    assert same(values)
    values[0].add_(1)
    assert not same(values)


def test_versions_without_addresses_are_looked_at_in_python() -> None:
    values = arguments()
    assert in_cpp(values, [2], [1]) is None and watch(values, [2], [1])(values)


@pytest.mark.parametrize("lacking", ["module", "layout"])
def test_without_the_cpp_part(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    """No compiler; or Python tensors that hold their C++ ones elsewhere than those of the PyTorch releases known."""
    if lacking == "module":
        monkeypatch.setattr(native, "module", lambda name: None)
    else:
        monkeypatch.setattr(module, "implementation", lambda tensor: tensor._cdata + 8)
    values = arguments()
    same = watch(values, [1, 2, 3], [1])
    assert type(same).__name__ == "function" and same(values)
    values[1].detach().add_(1)
    assert not same(values)


def test_wrong_arguments_are_errors_not_crashes() -> None:
    extension = native.module("watch")
    types, values = (torch.Tensor, Parameter), (torch.zeros(2), 3)
    lies = values[0]._cdata
    for arguments, error in (
        ((types, values, [(2, lies, False)]), IndexError),
        ((types, values, [(-1, lies, False)]), IndexError),
        ((types, values, [(1, lies, False)]), TypeError),
        ((types, values, [(0, "x", False)]), TypeError),
        ((types, values, [(0, lies)]), TypeError),
        ((types, values, [3]), TypeError),
        ((types, [*values], []), TypeError),
        (((torch.Tensor,), values, []), TypeError),
        ((types, values, ()), TypeError),
    ):
        with pytest.raises(error):
            extension.watch(*arguments)
    assert extension.watch(types, values, [(0, lies + 8, False)]) is None
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError):
        extension.watch(types, (sparse,), [(0, sparse._cdata, False)])
    with torch.inference_mode():
        unversioned = torch.zeros(2)
    with pytest.raises(RuntimeError, match="version"):
        extension.watch(types, (unversioned,), [(0, unversioned._cdata, True)])


@torch.no_grad()
def test_the_two_checks_agree_on_what_is_done_to_tensors() -> None:
    """One edit after another, in an order of its own for each seed, on tensors and on views of one memory."""

    def edited(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x

    def given_others(x: torch.Tensor) -> torch.Tensor:
        x.data = x.data.clone()
        return x

    def shared(x: torch.Tensor) -> torch.Tensor:
        kept.append(torch._lazy_clone(x))  # the memory of both until one is written to
        return x

    def exchanged(x: torch.Tensor) -> torch.Tensor:
        torch.utils.swap_tensors(x, torch.full_like(x, 5))
        return x

    def resized(x: torch.Tensor) -> torch.Tensor:
        return x.resize_(x.numel() + 512)

    def through_data(x: torch.Tensor) -> torch.Tensor:
        x.data.mul_(2)
        return x

    actions = (edited, given_others, shared, exchanged, resized, through_data, lambda x: x.detach(), lambda x: x.data)
    kept: list[torch.Tensor] = []
    told = set()
    for seed in range(40):
        chosen = torch.Generator().manual_seed(seed)
        memory = torch.randn(64)
        values: list[object] = [1, memory[:16], memory[16:], *(torch.randn(8) for _ in range(3)), torch.randn(0)]
        watched = range(1, len(values))
        checks = [make(values, watched, [1, 3, 4, 6]) for make in LOOPS.values()]
        for _ in range(3):
            at, action = (int(torch.randint(n, (), generator=chosen)) for n in (len(watched), len(actions)))
            values[1 + at] = actions[action](values[1 + at])
            answers = {check(tuple(values)) for check in checks}
            assert len(answers) == 1, (seed, at, action)
            told |= answers
    assert told == {True, False}
