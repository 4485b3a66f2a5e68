"""Running a captured graph node by node, with the bodies of wrapper higher-order ops in line."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Interpreter

from .errors import CaptureError
from .fast_paths import written_out
from .regions import mark_region


class Inliner(Interpreter):
    """Runs a graph node by node; the bodies of wrapper higher-order ops run in line."""

    def __init__(self, module: GraphModule):
        super().__init__(module)
        self._autocasts: list[torch.autocast] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:
            while self._autocasts:  # an error in the middle of a region
                self._autocasts.pop().__exit__(None, None, None)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(target, "__name__", "")
        if target is torch.amp.autocast_mode._enter_autocast:
            # Under a tracer the bare function is recorded but not run: dtypes would be those without autocast.
            self._autocasts.append(torch.autocast(*args))
            return self._autocasts[-1].__enter__()
        if target is torch.amp.autocast_mode._exit_autocast:
            return self._autocasts.pop().__exit__(None, None, None)
        written = written_out(target, args, kwargs)
        if written is not None:
            return written()
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._wrapped(name, args)
        return super().call_function(target, args, kwargs)

    def _wrapped(self, name: str, args: tuple[Any, ...]) -> Any:
        """The body of a higher-order op that only wraps it; one that chooses or repeats its body is refused."""
        if name == "wrap_with_set_grad_enabled":
            with torch.set_grad_enabled(args[0]):
                return args[1](*args[2:])
        if name == "wrap_with_autocast":
            device, dtype, enabled, cache, body, *rest = args
            with torch.autocast(device, dtype, enabled, cache):
                return body(*rest)
        if name == "tag_activation_checkpoint":
            body, *rest = args
            if isinstance(body, GraphModule):
                mark_region(body)
                return Inliner(body).run(*rest)
            return body(*rest)
        if name == "autograd_function_apply":
            forward, _, *rest = args
            if not _wants_gradient(rest):
                return forward(*rest)
            raise CaptureError(
                "a torch.autograd.Function has a backward of its own, which a captured graph would lose",
                remedy="call the function that applies it under torch.compiler.disable: the rest is still compiled",
            )
        raise CaptureError(
            f"the model calls {name}, whose body is a graph of its own",
            remedy="put that call in a function under torch.compiler.disable: the rest is still compiled",
        )


def _wants_gradient(values: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)
