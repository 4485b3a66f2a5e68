"""What a replay hands out: copies in C++, and the same through PyTorch's operators."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fuseline.runtime import native
from fuseline.runtime.results import Copies, copier, in_cpp, in_python

WAYS: dict[str, Callable[[Any], Copies | None]] = {"C++": lambda x: in_cpp(x, 0), "PyTorch": in_python}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64)


@pytest.fixture(params=WAYS)
def make(request: pytest.FixtureRequest) -> Callable[[Any], Copies]:
    def made(results: Any) -> Copies:
        copies = WAYS[request.param](results)
        assert copies is not None
        return copies

    return made


def dense() -> list[torch.Tensor]:
    whole = torch.randn(6, 5, 4)
    return [
        *((torch.randn(2, 3) * 50).to(dtype) for dtype in DTYPES),
        torch.tensor(3.5),
        whole.transpose(0, 2),
        whole[2:4],
        whole.permute(2, 0, 1)[:, :, None],
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(1, 7)[:, None, :].expand(1, 1, 7),
    ]


def like(copy: torch.Tensor, source: torch.Tensor) -> None:
    assert torch.equal(copy, source) and copy.dtype is source.dtype and copy.device == source.device
    clone = source.clone()
    assert copy.stride() == clone.stride() and copy.storage_offset() == 0 and type(copy) is torch.Tensor
    assert copy.untyped_storage().nbytes() == clone.untyped_storage().nbytes()
    assert copy.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()
    assert not copy.requires_grad and copy.grad_fn is None and copy.is_leaf
    assert torch._C._dispatch_keys(copy) == torch._C._dispatch_keys(clone)


def test_there_is_a_compiler_here() -> None:
    assert native.module("results") is not None and type(copier([torch.zeros(2)], 0)).__name__ != "function"


def test_layouts_and_dtypes(make: Callable[[Any], Copies]) -> None:
    sources = dense()
    for copy, source in zip(make(sources)(), sources, strict=True):
        like(copy, source)
    for source in sources:
        like(make(source)(), source)


def test_each_call_gives_other_memory_that_stays(make: Callable[[Any], Copies]) -> None:
    source = torch.zeros(1000)
    copies, kept = make([source]), []
    for n in range(20):
        source.fill_(n)
        kept.append(copies()[0])
    assert [x.unique().tolist() for x in kept] == [[n] for n in range(20)]
    assert len({x.data_ptr() for x in kept}) == 20


def test_a_tuple_with_what_is_no_tensor_or_one_tensor(make: Callable[[Any], Copies]) -> None:
    x, y = torch.randn(3), torch.randn(4)
    found = make([x, 7, None, y, "word"])()
    assert type(found) is tuple and found[1:3] == (7, None) and found[4] == "word"
    like(found[0], x)
    like(found[3], y)
    assert isinstance(make(x)(), torch.Tensor)


def test_a_copy_is_as_any_tensor(make: Callable[[Any], Copies]) -> None:
    """It can be resized, edited, read through views, differentiated, and takes part in autograd's bookkeeping."""
    (copy,) = make([torch.ones(2, 3)])()
    version = copy._version
    copy.mul_(2)
    assert copy._version == version + 1 and copy.view(6).sum() == 12
    copy.requires_grad_()
    (copy * 3).sum().backward()
    assert copy.grad is not None and copy.grad.eq(3).all()
    again = make([torch.ones(2, 3)])()[0].resize_(40, 50)
    assert again.shape == (40, 50)
    alone = make(torch.ones(2))()
    alone.word = "kept"
    held = [alone]
    del alone
    gc.collect()
    assert held[0].word == "kept"


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_inference_tensors_where_the_caller_asks_for_them(make: Any, recorded: bool, called: bool) -> None:
    with torch.inference_mode(recorded):
        copies = make([torch.ones(3)])
    with torch.inference_mode(called):
        (copy,) = copies()
    with torch.inference_mode(called):
        clone = torch.ones(3).clone()
    assert torch._C._dispatch_keys(copy) == torch._C._dispatch_keys(clone)
    assert copy.is_inference() == called and torch.equal(copy + 1, torch.full((3,), 2.0))
    if not called:
        assert (copy.requires_grad_() * 2).requires_grad and copy._version >= 0


@pytest.mark.one_in(2)
def test_memory_ends_with_the_copies_and_the_results_with_the_copier(make: Callable[[Any], Copies]) -> None:
    source, other = torch.zeros(8), object()
    copies = make([source, other, None])
    before = sys.getrefcount(source), sys.getrefcount(other)
    for _ in range(1000):
        copies()
    assert (sys.getrefcount(source), sys.getrefcount(other)) == before
    (first, *_) = copies()
    storage = weakref.ref(first.untyped_storage())
    del first
    gc.collect()
    assert storage() is None
    alive = weakref.ref(source)
    del source
    assert alive() is not None and torch.equal(copies()[0], torch.zeros(8))
    del copies
    gc.collect()
    assert alive() is None


def test_what_is_not_plain_is_cloned() -> None:
    grad = torch.ones(3, requires_grad=True)
    odd = [
        torch.randn(4, 4)[:, :2],
        torch.randn(4).expand(3, 4),
        torch.empty(0, 3),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex64).conj().imag,
        torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.nn.Parameter(torch.ones(3)),
        grad * 2,
    ]
    for x in odd:
        assert in_cpp([x], 0) is None
        (copy,) = copier([torch.ones(1), x], 0)()[1:]
        assert copy is not x and copy.shape == x.shape and copy.is_conj() == x.clone().is_conj()
    assert in_cpp([], 0) is None and in_cpp([3], 0) is None and copier([3], 0)() == (3,)
    assert in_cpp([torch.ones(2), torch.zeros(2, device="meta")], 0) is None


def test_without_the_cpp_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", lambda name: None)
    x = torch.randn(3)
    like(copier([x], 0)()[0], x)
    like(copier(x, 0)(), x)


def test_what_fails_is_left_to_pytorch() -> None:
    """Memory that cannot be had: PyTorch's own error, of whatever class, reaches the caller."""
    x = torch.empty(1).as_strided((1 << 50,), (0,))
    entry = [(0, x._cdata)]

    def otherwise() -> Any:
        raise MemoryError("in PyTorch's words")

    copies = native.module("results").copier((x,), False, entry, 0, otherwise)
    with pytest.raises(MemoryError, match="in PyTorch's words"):
        copies()


def test_wrong_arguments_are_errors_not_crashes() -> None:
    extension, x = native.module("results"), torch.ones(2)
    entry, cloned = (0, x._cdata), lambda: None
    for arguments in (
        ([x], False, [entry], 0, cloned),
        ((x,), False, (entry,), 0, cloned),
        ((x,), False, [0], 0, cloned),
        ((x,), False, [(0,)], 0, cloned),
        ((x,), False, [(0, "x")], 0, cloned),
        ((x,), False, [entry], "stream", cloned),
        ((x,), False, [entry], 0),
    ):
        with pytest.raises(TypeError):
            extension.copier(*arguments)
