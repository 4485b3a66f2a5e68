"""A cluster of pointwise operations and a softmax is one kernel: one read of each input, one write, masked at the end
of a row, whose padding cannot win the maximum nor count in the sum."""

import torch
import torch.nn.functional as F

import fuseline
from fuseline.codegen.lower import lower


class Cluster(torch.nn.Module):
    def forward(self, x, y):
        h = F.silu(x) * y + x
        return torch.softmax(h * 2.0, -1)


rows = torch.export.Dim("rows")
x, y = torch.randn(3, 50, dtype=torch.bfloat16), torch.randn(3, 50, dtype=torch.bfloat16)
after, _ = fuseline.Pipeline("fuse").run(fuseline.capture(Cluster(), (x, y), dynamic=({0: rows}, {0: rows})))
print(lower(after).source)

# CHECK:      1 kernels for 1 regions, 0 regions run through PyTorch
# CHECK:      # aten.silu.default, aten.mul.Tensor, aten.add.Tensor, aten.softmax.int
# CHECK-NEXT: # lines: pointwise_kernel.py:{{[0-9]+}}, pointwise_kernel.py:{{[0-9]+}}
# CHECK-NEXT: # made by: fuse/
# CHECK-NEXT: @triton.jit
# CHECK-SAME: do_not_specialize=["rows"]
# CHECK-NEXT: def [[KERNEL:\w+]](
# CHECK:      [[INSIDE:\w+]] = [[COLUMN:\w+]] < 50
# CHECK:      [[ROW_INSIDE:\w+]] = {{\w+}} < rows
# Addresses are 64 bits wide, the arithmetic is float32:
# CHECK:      = {{\w+}}.to(tl.int64)
# CHECK:      [[X:\w+]] = tl.load(x_ptr + {{.*}}mask=[[ROW_INSIDE]] & [[INSIDE]]{{.*}}.to(tl.float32)
# CHECK:      [[Y:\w+]] = tl.load(y_ptr + {{.*}}mask=[[ROW_INSIDE]] & [[INSIDE]]{{.*}}.to(tl.float32)
# CHECK-NOT:  tl.load
# CHECK:      tl.max(tl.where([[INSIDE]], {{\w+}}, float("-inf")), 1
# CHECK:      tl.sum(tl.where([[INSIDE]], {{\w+}}, 0.0), 1
# CHECK-NOT:  tl.load
# CHECK:      tl.store(out_ptr + {{.*}}.to(tl.bfloat16), mask=[[ROW_INSIDE]] & [[INSIDE]])
# CHECK-NOT:  tl.{{load|store}}
# An empty batch launches nothing:
# CHECK:      if {{\w+}} > 0:
# CHECK:      [[KERNEL]][(triton.cdiv(
# CHECK-NOT:  torch.ops
# CHECK:      def call(
