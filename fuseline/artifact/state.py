"""What a module holds: its parameters, its buffers, and tensors that are plain attributes of it, each by its name."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator
from dataclasses import dataclass

import torch

from ..compiler.errors import UserError

PARAMETER, BUFFER, ATTRIBUTE = "parameter", "buffer", "attribute"


@dataclass(frozen=True)
class Held:
    """One tensor of a module, at one of its names."""

    name: str
    role: str
    tensor: torch.Tensor


def state_of(model: torch.nn.Module) -> list[Held]:
    """Every tensor of `model` that a checkpoint would hold and those it would not, tied ones under all their names."""
    return list(_state(model))


def _state(model: torch.nn.Module) -> Iterator[Held]:
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            yield Held(prefix + name, PARAMETER, tensor)
        for name, tensor in module.named_buffers(recurse=False, remove_duplicate=False):
            yield Held(prefix + name, BUFFER, tensor)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield Held(prefix + name, ATTRIBUTE, value)


def put(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Sets the tensor called `name`, in the role that it has in the module."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)


def memory(tensor: torch.Tensor) -> Hashable:
    """Equal for two tensors that are the same elements of the same memory."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


def order_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions from the outermost to the innermost, of a dense tensor that is not stored row by row."""
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))
    return tuple(order) if tensor.permute(order).is_contiguous() else None


def in_order(tensor: torch.Tensor, order: tuple[int, ...] | None) -> torch.Tensor:
    """A contiguous tensor's values, in the memory order that `order_of` gave."""
    if order is None:
        return tensor
    back = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


def refuse_left_on_meta(model: torch.nn.Module, known: Container[str]) -> None:
    """Refuses a module with tensors without values beside the `known` ones: in a list, a dict or an object of its own.

    Raises:
        UserError: naming one.
    """
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            full = f"{path}.{name}" if path else name
            if full in known or name in ("_parameters", "_buffers", "_modules"):
                continue
            leaves = torch.utils._pytree.tree_leaves(value)
            if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "meta" for leaf in leaves):
                raise UserError(
                    f"'{full}' of {type(model).__name__} holds a tensor that the artifact has no values for",
                    ["stored are parameters, buffers, and tensors that are attributes of a module"],
                    "make it a buffer (register_buffer), or give load an instance: fuseline.load(path, model=Net())",
                )
