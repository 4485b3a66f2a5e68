"""FSDP2: parameters sharded over processes by `fully_shard`, blocks compiled by Fuseline.

torchrun --nproc-per-node 2 examples/tools/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from fuseline.backend import recent
from fuseline.models.decoder import TinyDecoder

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
if device == "cuda":
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
torch.manual_seed(0)
model = TinyDecoder(vocabulary=64, hidden=32, layers=2).to(device)
for layer in model.layers:
    layer.compile(backend="fuseline")
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
ids = (torch.arange(32, device=device) + dist.get_rank()).reshape(2, 16) % 64
losses = []
for _ in range(3):
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
if dist.get_rank() == 0:
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; raise rewrote {recent[-1].report['raise'].matched} sites")
dist.destroy_process_group()
