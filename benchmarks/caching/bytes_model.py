"""A small Llama over bytes with as many key heads as query heads, trained on the machine's own text.

No published model of that kind is small enough to come with a package, so the multi-head rows have this one. Its
attention has the shape of Llama-2-7B's, 32 heads of 128 channels: what a mean over heads and scales of a token cost
depends on that alone.
"""

from __future__ import annotations

import contextlib
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from fuseline.models import text

TOKENS = {"cuda": 16384, "cpu": 1024}  # of a step
RATE = 1e-3


def corpus() -> torch.Tensor:
    """Bytes to train on: the standard library's sources, and the half of its manual that nothing is measured on."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted([*library.glob("*.py"), *library.glob("*/*.py")])
    left_out = {"site-packages", "dist-packages", "test", "pydoc_data"}
    parts = [path.read_bytes() for path in files if path.relative_to(library).parts[0] not in left_out]
    parts += [text.calibration_text().encode()] * 4
    return torch.frombuffer(bytearray(b"\n\n".join(parts)), dtype=torch.uint8)


def train(device: torch.device, seconds: float, length: int, seed: int = 0) -> tuple[Any, dict[str, float]]:
    """The model in float32, and how it was trained: steps, tokens, seconds, the last losses in nats a byte.

    On a GPU products are in bfloat16.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    on_gpu = device.type == "cuda"
    hidden, layers = (512, 6) if on_gpu else (128, 3)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    source = corpus()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    draw, began, step, losses = torch.Generator().manual_seed(seed), time.monotonic(), 0, []
    batch = max(1, TOKENS[device.type] // length)
    while (spent := time.monotonic() - began) < seconds:
        for group in optimizer.param_groups:  # warmed up, then down to nothing at the end
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * max(0.02, 1 - spent / seconds)
        starts = torch.randint(len(source) - length - 1, (batch,), generator=draw).tolist()
        ids = torch.stack([source[s : s + length + 1] for s in starts]).long().to(device)
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            logits = model(ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
    last = losses[-20:]
    return model.eval(), {
        "steps": step, "trained_tokens": step * batch * length, "train_s": seconds, "train_loss": sum(last) / len(last)
    }  # fmt: skip
