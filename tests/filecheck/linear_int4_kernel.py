"""The template of int4 weights in groups that no words hold, behind a norm: a row costs one read of x and each code.

Columns are 201, which no block divides: both kernels mask their last ones. Rows are addressed with 64 bits."""

import torch

import fuseline
from fuseline.codegen.lower import lower


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up = torch.nn.RMSNorm(96), torch.nn.Linear(96, 201, bias=False)

    def forward(self, x):
        return torch.relu(self.up(self.norm(x)))


model, x = Layer().to(torch.bfloat16), torch.randn(3, 96, dtype=torch.bfloat16)
program = fuseline.capture(model, (x,), dynamic=({0: torch.export.Dim("rows")},))
after, _ = fuseline.Pipeline("raise,quantize{weights=int4:g24},fuse").run(program)
print(lower(after).source)


# CHECK:      2 kernels for 1 regions, 0 regions run through PyTorch
# CHECK:      # made by: {{.*}}raise/RMSNorm{{.*}}quantize/linear
# CHECK:      # rms_norm → linear (201 x 96 int4:g24 with zero points) → relu
# CHECK:      def [[ROW:\w+_row]](
# CHECK:      [[X:\w+]] = x_ptr + {{\w+}}.to(tl.int64) * 96
# CHECK:      [[IN:\w+]] = [[N:\w+]] < 201
# One pass over the row gives the norm's sum of squares and the products: its halves are read once each, the codes once.
# CHECK:      for {{.*}} in tl.range(
# CHECK-NOT:  for
# CHECK:      [[LOW:\w+]] = tl.load([[X]] + k, mask=live, other=0.0).to(tl.float32)
# CHECK-NEXT: [[SQUARES:\w+]] += [[LOW]] * [[LOW]]
# CHECK:      [[HIGH:\w+]] = tl.load([[X]] + k + 12, mask=live, other=0.0).to(tl.float32)
# CHECK-NEXT: [[SQUARES]] += [[HIGH]] * [[HIGH]]
# CHECK-NOT:  tl.load([[X]]
# CHECK:      [[CODES:\w+]] = tl.load(codes_ptr + {{.*}}[[IN]]{{.*}}other=0)
# CHECK-NOT:  tl.load({{codes_ptr|x_row}}
# CHECK-DAG:  ([[CODES]] & 15)
# CHECK-DAG:  ([[CODES]] & 240)
# CHECK-NOT:  tl.load(codes_ptr
# CHECK:      tl.rsqrt({{.*}}[[SQUARES]]{{.*}} / 96 + 1.19
# CHECK:      tl.where([[Y:\w+]] < 0, 0.0, [[Y]])
# CHECK:      tl.store({{\w+}} + {{\w+}}.to(tl.int64) * 201 + [[N]], {{.*}}.to(tl.bfloat16), mask=[[IN]])
# CHECK-NOT:  tl.store
# CHECK:      def [[TILE:\w+_tile]](
# CHECK:      [[IN_M:\w+]] = (m < M)[:, None]
# CHECK:      [[X:\w+]] = x_ptr + m.to(tl.int64)[:, None] * 96
# CHECK:      [[IN_N:\w+]] = n < 201
# CHECK:      tl.load([[X]] + {{.*}}mask=[[IN_M]]
# CHECK:      tl.load(codes_ptr + {{.*}}mask=[[IN_N]]
# CHECK:      tl.dot(
# CHECK:      tl.store({{.*}}.to(tl.bfloat16), mask=[[IN_M]] & [[IN_N]]
# The host takes one or the other by the number of rows, which is nowhere baked in:
# CHECK:      if m <= {{[0-9]+}}:
# CHECK:      [[ROW]][(m *
# CHECK:      else:
# CHECK:      [[TILE]][(triton.cdiv(m,
