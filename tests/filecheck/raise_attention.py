"""Attention written out over repeated keys and values, its mask built from positions: the mask is proved causal and
goes away, the repeats become grouped queries, and the length stays a symbol."""

import torch

import fuseline
from fuseline.compiler.observe import Print


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        positions = torch.arange(q.shape[2])
        mask = positions[None, :] <= positions[:, None]
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        scores = (q @ k.transpose(-1, -2)) * 0.25
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1) @ v


q, k, v = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)
length = torch.export.Dim("length", min=2)
program = fuseline.capture(Attention(), (q, k, v), dynamic=({2: length},) * 3)
fuseline.Pipeline("raise").run(program, [Print("raise", print)])

# CHECK-LABEL: # after raise
# CHECK:       def forward(self, [[Q:\w+]], [[K:\w+]], [[V:\w+]]):
# CHECK-NOT:   torch.ops.aten
# CHECK:       torch.ops.fuseline.attention.default([[Q]], [[K]], [[V]], None, 0.25, 'causal', 0, 0, 0.0)
# CHECK-SAME:  # float32[1, 4, s{{[0-9]+}}, 16]
# CHECK-NOT:   torch.ops.aten
# CHECK:       return
