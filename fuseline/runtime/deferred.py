"""A result that is computed when something reads its elements: what a loop that reads the loss alone never pays for.

`Deferred` is a tensor whose shape, dtype and device are known and whose elements are not there yet. Whatever is done
with it computes them first, with gradients, and then goes on with an ordinary tensor; casts are put off too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..compiler.deferred import Tail
from ..compiler.errors import FuselineError

_T = torch.Tensor
_CASTS = {_T.float: torch.float32, _T.double: torch.float64, _T.half: torch.float16, _T.bfloat16: torch.bfloat16}
_KNOWN = {
    getattr(_T, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_cuda", "is_sparse",
                 "is_quantized", "is_meta")
} | {
    _T.size, _T.dim, _T.numel, _T.is_floating_point, _T.is_complex, _T.element_size, _T.get_device, _T.ndimension,
    _T.nelement, _T.__len__, torch.is_tensor, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip


class Deferred(torch.Tensor):
    """A tensor whose elements `compute` gives, once, when something needs them."""

    _compute: Callable[[], torch.Tensor]
    _value: torch.Tensor | None
    _hooks: list[Any]

    @staticmethod
    def __new__(
        cls, compute: Callable[[], torch.Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device,
        requires_grad: bool = True,
    ) -> Deferred:  # fmt: skip
        made = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=requires_grad
        )
        made._compute, made._value, made._hooks = compute, None, []
        return made  # type: ignore[no-any-return]

    def __init__(self, *args: Any) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(elements(self))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, Deferred) and first._value is None:
            if func in _CASTS and len(args) == 1 and not kwargs:
                if first.dtype == _CASTS[func]:
                    return first
                cast = lambda: func(elements(first))
                return Deferred(cast, first.shape, _CASTS[func], first.device, first.requires_grad)
            if func is _T.register_hook:  # FSDP2 hangs one on whatever a module returns
                first._hooks.append(args[1])
                return _Handle(first._hooks, args[1])
        args, kwargs = torch.utils._pytree.tree_map_only(Deferred, elements, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(Deferred, elements, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Handle:
    """Takes a hook back that was put on a tensor before it was there."""

    def __init__(self, hooks: list[Any], hook: Any):
        self._hooks, self._hook = hooks, hook

    def remove(self) -> None:
        if self._hook in self._hooks:
            self._hooks.remove(self._hook)


def elements(tensor: Deferred) -> torch.Tensor:
    """The ordinary tensor that a deferred one stands for."""
    if tensor._value is None:
        with torch.inference_mode(False), torch.enable_grad():
            tensor._value = tensor._compute()
        for hook in tensor._hooks:
            if tensor._value.requires_grad:
                tensor._value.register_hook(hook)
        del tensor._compute
    return tensor._value


class WithTails:
    """A compiled graph whose results at some places are what a tail reads: there it gives tensors that are deferred.

    Args:
        run: the graph; its results are flat.
        tails: by place among the results, with the places of weight and bias among the inputs.
    """

    def __init__(self, run: Callable[..., Any], tails: dict[int, tuple[Tail, int, int | None]]):
        self.run, self.tails = run, tails

    def __call__(self, *inputs: Any) -> Any:
        results = list(self.run(*inputs))
        for place, (tail, weight, bias) in self.tails.items():
            given = inputs[weight], None if bias is None else inputs[bias]
            results[place] = deferred(tail, results[place], *given)
        return results


def deferred(tail: Tail, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Deferred:
    """The result of a tail, for later.

    Raises (when it is read):
        FuselineError: a parameter was edited in between.
    """
    versions = [t if t is None else t._version for t in (x, weight, bias)]

    def compute() -> torch.Tensor:
        if versions != [t if t is None else t._version for t in (x, weight, bias)]:
            raise FuselineError(
                "these logits were left to be computed when they are read, and the model was changed since",
                ["a parameter that they depend on was edited in place, as optimizer.step() does"],
                'read them before the step, or options={"pipeline": "…,fuse-loss{logits=kept},…"}',
            )
        return tail.compute(x, weight, bias)

    learns = any(t is not None and t.requires_grad for t in (x, weight, bias))
    return Deferred(compute, (*x.shape[:-1], weight.shape[0]), tail.result, x.device, learns)
