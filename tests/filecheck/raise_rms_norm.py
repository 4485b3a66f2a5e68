"""RMSNorm as decoders write it, with its statistics in float32, becomes one op; so does the one around zero, 1 + w."""

import torch

import fuseline
from fuseline.compiler.observe import Print


class Norms(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        self.around_zero = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = self.scale * h.to(x.dtype)
        h = y.float()
        h = h / torch.sqrt((h * h).sum(-1, keepdim=True) / 8 + 1e-5)
        return (h * (1.0 + self.around_zero.float())).to(x.dtype)


program = fuseline.capture(Norms(), (torch.randn(3, 8, dtype=torch.bfloat16),))
fuseline.Pipeline("raise").run(program, [Print("raise", print)])

# CHECK-LABEL: # after raise: 2 rewrites, 0 refused
# CHECK:       def forward(self, [[X:\w+]], [[W:\w*scale]], [[V:\w*around_zero]]):
# Statistics in float32, the cast before the weight:
# CHECK-NOT:   torch.ops.aten
# CHECK:       [[Y:\w+]] = torch.ops.fuseline.rms_norm.default([[X]], [[W]], 1e-06, False, torch.float32, True)
# CHECK-SAME:  # bfloat16[3, 8]
# Then 1 + w, with the cast behind it:
# CHECK-NOT:   torch.ops.aten
# CHECK:       [[Z:\w+]] = torch.ops.fuseline.rms_norm.default([[Y]], [[V]], 1e-05, True, torch.float32, False)
# CHECK-NOT:   torch.ops.aten
# CHECK:       return ([[Z]],)
