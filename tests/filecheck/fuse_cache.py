"""A cache that the graph writes to: the write and what reads the cache around it stay where they were, outside."""

import torch

import fuseline
from fuseline.compiler.observe import Print


class Step(torch.nn.Module):
    def forward(self, x, cache, row):
        before = torch.tanh(cache) * 2.0 + 1.0
        cache.index_copy_(0, row, torch.exp(x) * 3.0 - 1.0)
        return torch.tanh(cache) * 2.0 - before


program = fuseline.capture(Step(), (torch.randn(1, 4), torch.randn(3, 4), torch.tensor([1])))
fuseline.Pipeline("fuse").run(program, [Print("fuse", print)])

# CHECK-LABEL: # after fuse
# CHECK:       def forward(self, [[X:\w+]], [[CACHE:\w+]], [[ROW:\w+]]):
# CHECK-DAG:   [[BEFORE:\w+]] = torch.ops.aten.tanh.default([[CACHE]])
# CHECK-DAG:   [[NEW:\w+]] = self.{{\w+}}([[X]])
# CHECK:       [[WRITTEN:\w+]] = torch.ops.aten.index_copy_.default([[CACHE]], 0, [[ROW]], [[NEW]])
# CHECK:       [[AFTER:\w+]] = torch.ops.aten.tanh.default([[WRITTEN]])
# CHECK:       self.{{\w+}}({{.*}}[[AFTER]]
# CHECK:       return
# In the regions there is no write, and nothing that reads the cache:
# CHECK-NOT:   aten.{{index_copy_|tanh}}
