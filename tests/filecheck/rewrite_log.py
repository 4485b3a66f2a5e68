"""The log of rewrites: each with its rule and where that is written, the site, the user's line, and what came of it."""

import torch
import torch.nn.functional as F

import fuseline
from fuseline.compiler.observe import Limit


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(8)
        self.gate, self.up = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(8, 16, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return F.silu(self.gate(h)) * self.up(h)


log = Limit()
program = fuseline.capture(Block(), (torch.randn(3, 8),))
fuseline.Pipeline("raise,quantize{weights=int8,skip=up},fuse").run(program, [log])
for entry in log.entries:
    print(entry, "| rule", entry.location, "| line", entry.line)
    print(*(f"- {text}" for text in entry.before), *(f"+ {text}" for text in entry.after), sep="\n")

# CHECK:      #1 raise/RMSNorm at norm/
# CHECK-SAME: rule {{.*}}fuseline/passes/raising/rms_norm.py:{{[0-9]+}} | line {{.*}}rewrite_log.py:{{[0-9]+}}
# CHECK:      - {{.*}}aten.rms_norm
# CHECK:      + {{.*}}fuseline.rms_norm
# CHECK:      #2 raise/SwiGLU at
# CHECK-SAME: rule {{.*}}fuseline/passes/raising/gated.py:{{[0-9]+}} | line {{.*}}rewrite_log.py:{{[0-9]+}}
# CHECK-DAG:  - {{.*}}aten.silu
# CHECK-DAG:  - {{.*}}aten.mul
# CHECK:      + {{.*}}fuseline.glu.default(linear, linear_1, 'silu') # float32[3, 16]
# The numbers run on over the passes; `up` was left out:
# CHECK:      #3 quantize/linear at gate/
# CHECK-SAME: fuseline/passes/quantize_products.py
# CHECK-NOT:  quantize/linear
# CHECK:      #4 fuse/
# CHECK-NOT:  {{raise|quantize}}/
