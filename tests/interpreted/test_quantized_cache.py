"""A model with a cache of codes on kernels in Triton's interpreter: prompt and steps, against eager."""

from __future__ import annotations

import pytest
import torch

import fuseline
from fuseline.quantized_cache import QuantizedCache
from tests.codegen.regions import error
from tests.generation.pairs import decoder


@pytest.mark.slow
@torch.no_grad()
def test_steps_from_kernels() -> None:
    """The ring turns over and a block is coded on the way; every second prompt is one that kernels do not take."""
    torch.compiler.reset()
    model = decoder("LlamaConfig", num_hidden_layers=1)
    heads, head = model.config.num_key_value_heads, model.config.hidden_size // model.config.num_attention_heads
    ids = torch.randint(model.config.vocab_size, (2, 50))

    def logits(run: torch.nn.Module) -> torch.Tensor:
        cache = QuantizedCache(model.config, 96, "int8:channel:g16", "int8:token", window=4, block=32)
        cache.early_initialization(2, heads, head, torch.float32, "cpu")
        found = [run(ids[:, :33], past_key_values=cache).logits[:, -1]]
        found += [run(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(33, 40)]
        return torch.stack(found)

    eager = logits(model)
    optimized = fuseline.optimize(model, "raise,fuse", target="triton")
    assert error(logits(optimized), eager) < 1e-5
    step = fuseline.reports(optimized)[-1]
    assert "cached_0" in step.program.module._modules and not step.refusals
    names = " ".join(kernel.name for kernel in step.kernels)
    assert "write_0" in names and "write_1" in names and "split" in names
