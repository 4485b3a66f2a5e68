"""What every model source returns, and how a model is asked for logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn


class Tokenizer(Protocol):
    """The part of a tokenizer that Fuseline uses; transformers' tokenizers have it."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass
class LoadedModel:
    """A model with example inputs to capture it with.

    Attributes:
        name: the spec it was loaded from, as the user wrote it.
        model: in eval mode, on the CPU.
        example_args, example_kwargs: inputs of one call. For a language model the first argument is int64 ids [1, T].
        tokenizer: None if the model doesn't read text.
        dynamic: dimensions of the example inputs to keep symbolic: {argument's name: {dimension: symbol's name}}.
        exported: the program of a `.pt2` file; `model` is then the module unflattened from it.
    """

    name: str
    model: nn.Module
    example_args: tuple[Any, ...] = ()
    example_kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    exported: torch.export.ExportedProgram | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids without the special tokens that a tokenizer adds around a sentence."""
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer")
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=False))  # type: ignore[call-arg]
        except TypeError:
            return list(self.tokenizer.encode(text))

    def decode(self, ids: list[int]) -> str:
        """Text of the ids without special tokens, spaces as they were."""
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer")
        try:
            exact = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            return self.tokenizer.decode(ids, **exact)  # type: ignore[call-arg]
        except TypeError:
            return self.tokenizer.decode(ids)

    def dynamic_shapes(self) -> dict[str, Any] | None:
        """`dynamic` as `torch.export` wants it: an entry for every argument; None if every size is static."""
        if not self.dynamic:
            return None
        names = list(inspect.signature(self.model.forward).parameters)[: len(self.example_args)]
        sizes = {name: dict.fromkeys(dims, torch.export.Dim.AUTO) for name, dims in self.dynamic.items()}
        return {name: sizes.get(name) for name in (*names, *self.example_kwargs)}

    def to(self, device: torch.device | str) -> LoadedModel:
        """Moves the module and the example inputs; returns itself."""
        self.model.to(device)
        move = lambda value: value.to(device) if isinstance(value, torch.Tensor) else value
        self.example_args = tuple(map(move, self.example_args))
        self.example_kwargs = {name: move(value) for name, value in self.example_kwargs.items()}
        return self

    def logits_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """ids [1, T] on the CPU → logits [1, T, V] on the CPU, without gradients, through `model.__call__`."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))

        def logits(ids: torch.Tensor) -> torch.Tensor:
            ids = ids.to(device)
            # One compiled graph for every length, instead of one for the first and another for all others.
            torch._dynamo.maybe_mark_dynamic(ids, 1)
            with torch.no_grad():
                return logits_of(self.model(ids, **self.example_kwargs)).cpu()

        return logits


def logits_of(output: Any) -> torch.Tensor:
    """The logits in a model's output: its field `logits`, the first tensor of a tuple, or the tensor itself."""
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    if isinstance(output, Mapping):
        return next(value for value in output.values() if isinstance(value, torch.Tensor))
    return output[0] if isinstance(output, (tuple, list)) else output
