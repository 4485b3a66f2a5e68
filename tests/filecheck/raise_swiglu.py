"""SwiGLU, as a call of silu and written out, becomes one op; a gate that meets itself is no gating."""

import torch
import torch.nn.functional as F

import fuseline
from fuseline.compiler.observe import Print


class Gates(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
        self.both = torch.nn.Linear(16, 32)

    def forward(self, x):
        x = F.silu(self.gate(x)) * self.up(x)
        a, b = self.both(x).chunk(2, -1)
        x = b * (a * torch.sigmoid(a))
        return x * torch.sigmoid(x)


program = fuseline.capture(Gates(), (torch.randn(3, 8),))
fuseline.Pipeline("raise").run(program, [Print("raise", print)])

# CHECK-LABEL: # after raise: 2 rewrites, 0 refused
# CHECK:       [[GATE:\w+]] = torch.ops.aten.linear.default({{\w+}}, gate_weight, gate_bias)
# CHECK:       [[UP:\w+]] = torch.ops.aten.linear.default({{\w+}}, up_weight, up_bias)
# CHECK:       torch.ops.fuseline.glu.default([[GATE]], [[UP]], 'silu')
# Halves of one linear; the activation is the first half's, on whichever side of the product it stands:
# CHECK:       [[HALVES:\w+]] = torch.ops.aten.chunk.default({{\w+}}, 2, -1)
# CHECK:       [[A:\w+]] = operator.getitem([[HALVES]], 0)
# CHECK:       [[B:\w+]] = operator.getitem([[HALVES]], 1)
# CHECK:       [[Y:\w+]] = torch.ops.fuseline.glu.default([[A]], [[B]], 'silu')
# x·sigmoid(x) is an activation, and stays:
# CHECK-NOT:   fuseline.glu
# CHECK:       [[S:\w+]] = torch.ops.aten.sigmoid.default([[Y]])
# CHECK:       torch.ops.aten.mul.Tensor([[Y]], [[S]])
# CHECK-NOT:   fuseline.glu
