"""Whether the tensors of a call lie where they did, and are what they were: asked before every replay.

A capture reads hundreds of tensors at addresses that were fixed when it was recorded, and copies that were derived from
others. So each of those addresses, and each version of what something was derived from, is looked at in every call: a
tensor that was moved (`p.data = …`) changes its address and no version, one that was edited its version and no address.
Neither identities nor a sample would do. (A weight that moved away and came back, over another value, is noticed as its
old memory is let go of: `compiler/binder.py`.)

At one token a step this is most of what our Python costs, and there is no cheap way to say it in Python: for 400
addresses and 225 versions on an H100's host, `map(Tensor.data_ptr, …)` took 37 to 47 us, PyTorch's own loop
(`same_addresses`) 35 to 58, the versions 18 to 30 more. A version read from C++ through Python's interface, 66 ns, was
still four times an address. `watch.cpp` therefore reads both from the tensor's fields, in one pass, in which a version
costs next to nothing beside its address. It runs where a C++ compiler is found; the loops here are what runs elsewhere,
and what it is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..compiler.compat import implementation, same_addresses
from ..compiler.weights import versions_of
from . import native

_TYPES = (torch.Tensor, torch.nn.Parameter)
Watch = Callable[[tuple[Any, ...]], bool]


def watch(values: Sequence[Any], addressed: Sequence[int], versioned: Sequence[int]) -> Watch:
    """A function that says of other values, a tuple, whether they are the same as these.

    Args:
        values: a call's arguments.
        addressed: positions of the tensors that must lie where these do.
        versioned: positions, all of them among `addressed`, of those that must not have been edited since. An inference
            tensor has no version, and its edits go unseen.
    """
    versioned = [i for i in versioned if not values[i].is_inference()]
    return in_cpp(values, addressed, versioned) or in_python(values, addressed, versioned)


def in_cpp(values: Sequence[Any], addressed: Sequence[int], versioned: Sequence[int]) -> Watch | None:
    """`watch` compiled; None where it cannot be, or a tensor is of a class of its own, or laid out in another way."""
    made = native.module("watch")
    if made is None or not set(versioned) <= set(addressed) or any(type(values[i]) not in _TYPES for i in addressed):
        return None
    counts = set(versioned)
    entries = [(i, implementation(values[i]), i in counts) for i in addressed]
    function: Watch | None = made.watch(_TYPES, tuple(values), entries)
    return function if function is not None and function(tuple(values)) else None


def in_python(values: Sequence[Any], addressed: Sequence[int], versioned: Sequence[int]) -> Watch:
    """`watch` as loops that the interpreter runs."""
    positions = list(addressed)
    addresses: list[int | None] = [None] * len(values)
    for i in positions:
        addresses[i] = values[i].data_ptr()
    versions = versions_of([values[i] for i in versioned])

    def same(others: tuple[Any, ...]) -> bool:
        return same_addresses(others, addresses, positions) and (
            not versions or versions_of([others[i] for i in versioned]) == versions
        )

    return same
