"""A mask that is not quite causal is not proved: it stays an argument, and the node says why."""

import torch

import fuseline
from fuseline.compiler.observe import Print


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        positions = torch.arange(q.shape[2])
        mask = positions[None, :] * 2 <= positions[:, None] + 3
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


q, k, v = (torch.randn(1, 2, 6, 16) for _ in range(3))
program = fuseline.capture(Attention(), (q, k, v))
after, _ = fuseline.Pipeline("raise").run(program, [Print("raise", print)])
for node in after.graph.nodes:
    if "fuseline_mask" in node.meta.get("custom", {}):
        print("mask:", node.meta["custom"]["fuseline_mask"])

# CHECK-LABEL: # after raise
# CHECK:       [[MASK:\w+]] = torch.ops.aten.le.Tensor
# CHECK:       torch.ops.fuseline.attention.default(q, k, v, [[MASK]], 0.25, 'full', 0, 0, 0.0)
# CHECK-NOT:   'causal'
# CHECK:       return
# CHECK:       mask: the mask depends on positions in another way than causal or sliding
