"""What is done to models of other libraries before they are captured, if these libraries are there."""

from __future__ import annotations

import contextlib
import sys
from contextlib import AbstractContextManager

import torch

from .compiler.capture import AROUND


def prepare(model: torch.nn.Module) -> None:
    """Has the experts of a transformers model that loops over them run as one op a layer, from here on."""
    if "transformers" in sys.modules:
        from .models.experts import use

        use(model)


def prepared(model: torch.nn.Module) -> AbstractContextManager[None]:
    """The same inside the block."""
    if "transformers" not in sys.modules:
        return contextlib.nullcontext()
    from .models.experts import used

    return used(model)


AROUND.append(prepared)
