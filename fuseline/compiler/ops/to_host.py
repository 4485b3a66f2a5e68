"""fuseline::to_host, from_host, arrived: a kept value's way to the host's memory and back, behind the computation.

The caching allocator is not told of the second stream: it would give such memory away only once the GPU has passed
that point, while the host, which allocates, is hundreds of calls ahead. A value is held here instead until the
computation's own stream has waited for its copy.
"""

from __future__ import annotations

import torch

from ._define import Kind, op

_Copy = tuple[torch.cuda.Event, torch.Tensor]
_streams: dict[torch.device, torch.cuda.Stream] = {}
_leaving: dict[torch.device, _Copy] = {}
_coming: dict[int, _Copy] = {}


@op("to_host(Tensor x) -> Tensor", kind=Kind.OTHER)
def to_host(x: torch.Tensor) -> torch.Tensor:
    """x on the host, in pinned memory where x is on a GPU: copied on its own stream while the caller's goes on, which
    waits for the copy before the next one begins. Strides stay as they are, for whoever views the value later."""
    if x.device.type != "cuda":
        return x.clone()
    _release(x.device)
    for address in [a for a, (event, _) in _coming.items() if event.query()]:  # of a backward that did not end
        del _coming[address]
    host = torch.empty_like(x, device="cpu", pin_memory=True)
    stream = _stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        host.copy_(x, non_blocking=True)
    _leaving[x.device] = stream.record_event(), x
    return host


@to_host.fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, device="cpu")


@op("from_host(Tensor x, Device device) -> Tensor", kind=Kind.OTHER)
def from_host(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device: the copy has begun, `arrived` waits for it."""
    device = torch.device(device)
    if device.type != "cuda":
        return x.clone()
    _release(device)
    here = torch.empty_like(x, device=device)
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # the memory may be in use by what was launched before
    with torch.cuda.stream(stream):
        here.copy_(x, non_blocking=True)
    _coming[here.data_ptr()] = (stream.record_event(), here)
    return here


@from_host.fake
def _(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(x, device=device)


@op("arrived(Tensor(a!) x) -> ()", kind=Kind.OTHER)
def arrived(x: torch.Tensor) -> None:
    """What is launched from here on waits until x is there."""
    event, _ = _coming.pop(x.data_ptr(), (None, x)) if x.device.type == "cuda" else (None, x)
    if event is not None:
        event.wait(torch.cuda.current_stream(x.device))


@arrived.fake
def _(x: torch.Tensor) -> None:
    return None


def _release(device: torch.device) -> None:
    """Lets go of what has left: the caller's stream waits for the copies first."""
    if device in _leaving:
        event, _ = _leaving.pop(device)
        event.wait(torch.cuda.current_stream(device))


def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device for both ways: the link is shared anyway, and what comes back left before."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
