"""`fuseline diff` shows what a pass did, under the modules it did it to; what only reads the new nodes is no change."""

import contextlib

import torch
import torch.nn.functional as F

from fuseline.cli import main


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(8)
        self.gate, self.up = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(8, 16, bias=False)
        self.down = torch.nn.Linear(16, 8, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def block():
    return Block(), (torch.randn(3, 8),)


if __name__ == "__main__":
    with contextlib.suppress(SystemExit):
        main(["diff", f"py:{__file__}:block", "-p", "raise"])

# CHECK:      --- py:{{.*}}diff_of_raise.py:block
# CHECK-NEXT: +++ py:{{.*}}diff_of_raise.py:block after raise
# CHECK:      @@ norm {{.*}}diff_of_raise.py:
# CHECK-NEXT: - {{\w+}} = rms_norm(x, {{.*}} float32[3, 8]
# CHECK-NEXT: + [[NORM:\w+]] = fuseline.rms_norm(x, norm.weight, {{.*}} float32[3, 8] by raise/RMSNorm
# What reads the norm is shown as it was, for the context:
# CHECK:      {{^ +}}[[GATE:\w+]] = linear([[NORM]], gate.weight)
# CHECK:      - [[SILU:\w+]] = silu([[GATE]])
# CHECK:      - {{\w+}} = mul([[SILU]], [[UP:\w+]])
# CHECK:      + {{\w+}} = fuseline.glu([[GATE]], [[UP]], activation='silu') float32[3, 16] by raise/SwiGLU
# CHECK-NOT:  {{^[-+] .* = linear}}
# CHECK:      nodes: {{[0-9]+}} unchanged, 1 removed, 2 replaced
# CHECK:      next:
