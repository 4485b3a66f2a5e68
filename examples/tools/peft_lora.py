"""Adapters of peft on a model that Fuseline rotates: frozen weights fold, the adapters train, and merging works."""

import torch
from peft import LoraConfig, get_peft_model

from fuseline.backend import recent
from fuseline.models import load

model = get_peft_model(load("demo:tiny-llama").model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
ids = torch.arange(32).reshape(2, 16)
with torch.no_grad():
    expected = model(ids).logits
compiled = torch.compile(model, backend="fuseline", options={"pipeline": "raise,rotate{r1},fuse"})
loss = compiled(input_ids=ids, labels=ids).loss
loss.backward()
trained = [name for name, p in model.named_parameters() if p.grad is not None]
print(f"loss {loss.item():.3f}; rotate rewrote {recent[-1].report['rotate'].matched} sites; {len(trained)} trained")
assert trained and all("lora_" in name for name in trained)
merged = model.merge_and_unload()
with torch.no_grad():
    print(f"merged, the logits differ by {(merged(ids).logits - expected).abs().max().item():.0e}")
