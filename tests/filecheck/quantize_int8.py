"""int8 weights and activations: codes and scales are weights of the graph, and one rounded input serves two linears."""

import torch

import fuseline
from fuseline.compiler.observe import Print


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = torch.nn.Linear(32, 16, bias=False), torch.nn.Linear(32, 8)

    def forward(self, x):
        return self.q(x), self.k(x)


program = fuseline.capture(Two(), (torch.randn(3, 32),))
fuseline.Pipeline("quantize{weights=int8,activations=int8}").run(program, [Print("quantize", print)])

# CHECK-LABEL: # after quantize{weights=int8,activations=int8}: 2 rewrites, 0 refused
# CHECK:       def forward(self, [[X:\w+]], {{.*}}q_weight_codes, q_weight_scale, k_weight_codes, k_weight_scale):
# The input is rounded once, one scale a token:
# CHECK:       [[PAIR:\w+]] = torch.ops.fuseline.quantize.default([[X]], 8, 32) # (int8[3, 32], float32[3, 1])
# CHECK:       [[CODES:\w+]] = operator.getitem([[PAIR]], 0)
# CHECK:       [[SCALE:\w+]] = operator.getitem([[PAIR]], 1)
# CHECK:       [[H:\w+]] = torch.ops.fuseline.dequantize.default([[CODES]], [[SCALE]], None, 8, 32, torch.float32)
# CHECK-NOT:   fuseline.quantize
# CHECK:       [[WQ:\w+]] = torch.ops.fuseline.dequantize.default(q_weight_codes, q_weight_scale, None, 8, 32,
# CHECK-SAME:  # float32[16, 32]
# CHECK:       [[Q:\w+]] = torch.ops.aten.linear.default([[H]], [[WQ]], None)
# CHECK-NOT:   fuseline.quantize
# CHECK:       [[WK:\w+]] = torch.ops.fuseline.dequantize.default(k_weight_codes, k_weight_scale, None, 8, 32,
# CHECK:       [[K:\w+]] = torch.ops.aten.linear.default([[H]], [[WK]], k_bias)
# CHECK:       return ([[Q]], [[K]])
