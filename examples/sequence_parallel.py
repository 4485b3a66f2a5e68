"""A Hugging Face training script on one long sequence, cut among processes by one changed line.

    torchrun --nproc-per-node=2 examples/sequence_parallel.py
    torchrun --nproc-per-node=2 examples/sequence_parallel.py --length 128 --steps 20

Without torchrun, or with `--plain`, it trains in one process as it did before the change.
"""

from __future__ import annotations

import argparse
import os
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT = 24  # bytes of each sequence that are a prompt: no loss on them


def batches(length: int, steps: int, device: torch.device):
    """Windows of Python's own documentation, byte by byte; the same ones in every process."""
    text = torch.tensor(list("".join(topics.values()).encode())[: (steps + 1) * 2 * length], dtype=torch.long)
    for step in range(steps):
        ids = text[step * 2 * length : (step + 1) * 2 * length].view(2, length).clamp(max=255).to(device)
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        yield {"input_ids": ids, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=63)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    parallel = "RANK" in os.environ and not options.plain
    device = torch.device("cpu")
    if parallel:
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    if parallel:  # the one line
        model.compile(backend="fuseline", options={"pipeline": "raise,sequence-parallel"})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    for step, batch in enumerate(batches(options.length, options.steps, device)):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not parallel or dist.get_rank() == 0:
            print(f"step {step}  loss {loss.item():.6f}", flush=True)
    if parallel:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
