"""The optimized model, through the front door that a user takes: its outputs, its metrics and its text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fuseline import breaks, reports
from fuseline.compiler.errors import FuselineError
from fuseline.compiler.observe.numerics import error
from fuseline.models import LoadedModel, logits_of
from fuseline.models.metrics import compare
from fuseline.models.text import evaluation_text, windows

WINDOW = 256
NO_REASON = (
    "it noted no reason; torch.compile may be switched off (TORCH_COMPILE_DISABLE), or nothing is computed on tensors"
)
EMPTY = {"perplexity_before": None, "perplexity_after": None, "kl": None, "top1": None, "tokens": 0}


def original(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same call with every compiled module in it running as its user wrote it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return run


def measure(loaded: LoadedModel, count: int) -> dict[str, Any]:
    """Compares the optimized model with itself uncompiled.

    Returns the fields of `Metrics` over `count` windows of held-out text (None where the model reads no text) and
    `error`, max|Δ|/max|reference| of the outputs on the example inputs in the model's own precision.

    Raises:
        FuselineError: no graph of the model was compiled; its figures would be those of the original.
    """
    if loaded.tokenizer is not None:
        logits = loaded.logits_fn()
        call = lambda: logits(loaded.example_args[0].cpu())
    else:
        call = lambda: logits_of(loaded.model(*loaded.example_args, **loaded.example_kwargs))
    with torch.no_grad():
        outputs = call()
        if not reports(loaded.model):
            raise FuselineError(
                f"Dynamo compiled no graph of {type(loaded.model).__name__}: the optimized model is the original",
                [str(one) for one in breaks(loaded.model)] or [NO_REASON],
                "move what cannot be traced out of the forward, or out of its loops and with blocks",
            )
        found: dict[str, Any] = {"error": error(outputs, original(call)())}
    if loaded.tokenizer is None or count < 1:
        return {**EMPTY, **found}
    text = windows(evaluation_text(), loaded.encode, WINDOW, count)
    return {**dataclasses.asdict(compare(original(logits), logits, text)), **found}


def continue_text(loaded: LoadedModel, prompt: str, tokens: int) -> str:
    """The prompt and at most `tokens` greedily chosen tokens after it, from the optimized model."""
    ids = torch.tensor([loaded.encode(prompt)], device=loaded.example_args[0].device)
    if hasattr(loaded.model, "generate") and getattr(loaded.model, "can_generate", lambda: True)():
        with torch.no_grad():
            ids = loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
    else:
        logits = loaded.logits_fn()
        for _ in range(tokens):
            following = logits(ids)[:, -1:].argmax(-1).to(ids.device)
            ids = torch.cat((ids, following), dim=1)
    return loaded.decode(ids[0].tolist())
