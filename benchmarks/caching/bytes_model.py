"""A small Llama over bytes with as many key heads as query heads, trained on the machine's own text.

No published model of that kind is small enough to come with a package, so the multi-head row has this one: 16 heads of
64 channels, as in a model of 1024 channels.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import functional as F

from fuseline.models import text

LENGTH, BATCH = 512, 8


def train(device: torch.device, seconds: float, seed: int = 0, layers: int = 4) -> tuple[Any, dict[str, float]]:
    """The model in float32, and how it was trained: steps, seconds, the last losses in nats a byte.

    The half of the text that is measured on is left out.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=704, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    source = torch.tensor(list(text.calibration_text().encode()), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    draw, began, step, losses = torch.Generator().manual_seed(seed), time.monotonic(), 0, []
    while (spent := time.monotonic() - began) < seconds:
        for group in optimizer.param_groups:  # warmed up, then down to nothing at the end
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * max(0.02, 1 - spent / seconds)
        starts = torch.randint(len(source) - LENGTH - 1, (BATCH,), generator=draw).tolist()
        ids = torch.stack([source[s : s + LENGTH + 1] for s in starts]).long().to(device)
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
    last = losses[-20:]
    return model.eval(), {"steps": step, "train_s": seconds, "train_loss": sum(last) / len(last)}
