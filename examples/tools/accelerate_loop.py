"""A training loop of accelerate's: `Accelerator(dynamo_backend="fuseline")`, or `--dynamo_backend=fuseline` of
`accelerate launch`."""

import torch
from accelerate import Accelerator

import fuseline.integrations  # noqa: F401
from fuseline.backend import recent
from fuseline.models.decoder import TinyDecoder

accelerator = Accelerator(dynamo_backend="fuseline", cpu=not torch.cuda.is_available())
model = TinyDecoder(vocabulary=64, hidden=32, layers=1)
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
model, optimizer = accelerator.prepare(model, optimizer)
ids = torch.arange(32, device=accelerator.device).reshape(2, 16)
losses = []
for _ in range(3):
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; raise rewrote {recent[-1].report['raise'].matched} sites")
