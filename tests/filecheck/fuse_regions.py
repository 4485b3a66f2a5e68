"""A gated MLP becomes two regions: the norm goes in front of gate and up and their gating behind, the residual sum
behind down. A sum over everything is nothing that a row of the linear has, and stays outside."""

import torch
import torch.nn.functional as F

import fuseline
from fuseline.compiler.observe import Print


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(8)
        self.gate, self.up = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(8, 16, bias=False)
        self.down = torch.nn.Linear(16, 8, bias=False)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return x.sum()


program = fuseline.capture(Block(), (torch.randn(3, 8),))
fuseline.Pipeline("raise,fuse").run(program, [Print("fuse", print)])

# CHECK-LABEL: # after fuse: 2 rewrites, 0 refused
# CHECK:       def forward(self, [[X:\w+]],
# CHECK-NOT:   torch.ops
# CHECK:       [[H:\w+]] = self.[[FIRST:\w+]]([[X]], norm_weight, gate_weight, up_weight)
# CHECK-NOT:   torch.ops
# CHECK:       [[Y:\w+]] = self.[[SECOND:\w+]]([[H]], down_weight, [[X]])
# CHECK:       [[SUM:\w+]] = torch.ops.aten.sum.default([[Y]])
# CHECK-NOT:   torch.ops
# CHECK:       return ([[SUM]],)
# CHECK:       def [[FIRST]](self, [[X:\w+]], norm_weight, gate_weight, up_weight):
# CHECK:       [[N:\w+]] = torch.ops.fuseline.rms_norm.default([[X]], norm_weight,
# CHECK-DAG:   [[G:\w+]] = torch.ops.aten.linear.default([[N]], gate_weight)
# CHECK-DAG:   [[U:\w+]] = torch.ops.aten.linear.default([[N]], up_weight)
# CHECK:       [[GLU:\w+]] = torch.ops.fuseline.glu.default([[G]], [[U]], 'silu')
# CHECK:       return [[GLU]]
# CHECK:       def [[SECOND]](self, [[H:\w+]], down_weight, [[X:\w+]]):
# CHECK:       [[D:\w+]] = torch.ops.aten.linear.default([[H]], down_weight)
# CHECK:       torch.ops.aten.add.Tensor([[X]], [[D]])
