"""A model and its optimized twin, which must generate the same tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch

import fuseline

BASE = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 59,
}  # fmt: skip


def decoder(config: str, **changes: Any) -> torch.nn.Module:
    """A random decoder, its weights scaled up so that the next tokens differ from one another."""
    import transformers

    torch.manual_seed(0)
    settings = getattr(transformers, config)(**{**BASE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def prompt(batch: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random ids, the first row padded on the left."""
    generator = torch.Generator().manual_seed(100 * batch + length)
    ids = torch.randint(2, 58, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


class Pair:
    """An optimized model beside the original; `check` compares what they generate."""

    def __init__(self, model: torch.nn.Module, pipeline: Any = None, **settings: Any):
        self.reference = copy.deepcopy(model)
        self.model = fuseline.optimize(model, *([pipeline] if pipeline else []), **settings)

    @property
    def captures(self) -> int:
        return len(fuseline.reports(self.model))

    def check(self, inputs: dict[str, torch.Tensor], **settings: Any) -> int:
        """Asserts equal tokens for equal seeds; returns how many graphs were captured for it."""
        before = self.captures
        torch.manual_seed(7)
        tokens = self.generate(self.model, inputs, settings)
        torch.manual_seed(7)
        expected = self.generate(self.reference, inputs, settings)
        assert torch.equal(tokens, expected), (settings, tokens.tolist(), expected.tolist())
        return self.captures - before

    def generate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], settings: dict[str, Any]) -> Any:
        settings = {"max_new_tokens": 8, "do_sample": False, **settings}
        return model.generate(**{k: v.clone() for k, v in inputs.items()}, **settings)


SAMPLING = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9}
STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("greedy", {}),
    ("sampling", SAMPLING),
    ("beam search", {"num_beams": 3}),
    ("beam sampling", {"num_beams": 3, **SAMPLING}),
    ("several sequences", {"num_return_sequences": 2, **SAMPLING}),
    ("processors", {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4}),
]
