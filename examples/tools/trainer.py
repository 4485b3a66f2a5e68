"""The Trainer of transformers compiles with Fuseline: forward and backward, two steps.

accelerate, which the Trainer asks, knows a fixed list of backends; the import of `fuseline.integrations` adds one.
"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

import fuseline.integrations  # noqa: F401
from fuseline.backend import recent
from fuseline.models import load

model = load("demo:tiny-llama").model
ids = torch.arange(64).reshape(4, 16)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=2,
    per_device_train_batch_size=2,
    torch_compile=True,
    torch_compile_backend="fuseline",
    report_to=[],
    save_strategy="no",
    use_cpu=not torch.cuda.is_available(),
)
result = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
print(f"loss {result.training_loss:.3f}; raise rewrote {recent[-1].report['raise'].matched} sites")
