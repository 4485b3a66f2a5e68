"""The template of coded weights behind a norm, int2 here: a row costs one read of x and of each code.

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
after, _ = fuseline.Pipeline("raise,quantize{weights=int2:g32},fuse").run(program)
print(lower(after).source)


# CHECK:      4 kernels for 1 regions, 0 regions run through PyTorch
# The norm is a kernel of its own, in float32 within, in the product's type without; it says what it stands for alone.
# CHECK:      # made by: raise/RMSNorm
# CHECK-NOT:  quantize/linear
# CHECK:      def [[NORM:\w+_norm]](
# CHECK:      total += x * x
# CHECK:      tl.rsqrt(tl.sum(total, 0) / 96 + 1.19
# CHECK:      tl.store(normed_ptr + row * 96 + k, h.to(tl.bfloat16), mask=k < 96)
# CHECK:      # made by: {{.*}}quantize/linear
# CHECK:      # rms_norm → linear (201 x 96 int2:g32 with zero points) → relu
# CHECK:      def [[FEW:\w+_few]](
# CHECK:      [[IN_M:\w+]] = (m < (1 if ROWS == 1 else M))[:, None]
# CHECK:      [[X_ROWS:\w+]] = x_ptr + m[:, None] * 96
# CHECK:      [[X:\w+]] = tl.trans([[X_ROWS]])
# CHECK:      [[IN_N:\w+]] = [[N:\w+]] < 201
# Scales and zero points of the first turn are read before the loop, those of the next one within it.
# CHECK:      [[SCALE:\w+]] = tl.load(scale_ptr + at, mask=[[IN_N]][:, None], other=0)
# CHECK:      [[ZERO:\w+]] = tl.load(zero_ptr + at, mask=[[IN_N]][:, None], other=0)
# CHECK:      for {{.*}} in range(
# CHECK-NOT:  for
# CHECK:      [[WORDS:\w+]] = tl.load({{.*}}, mask=[[IN_N]][:, None], other=0)
# CHECK:      x = tl.load([[X]] + [[K:\w+]], mask={{.*}}([[K]] < 96), other=0.0)
# CHECK:      [[SCALE]].to(tl.float32)
# CHECK:      [[ZERO]].to(tl.float32) + 128.0
# CHECK:      [[SCALE]] = tl.load(scale_ptr + at
# CHECK:      [[ZERO]] = tl.load(zero_ptr + at
# Both halves of a word are masked at once, eight times for its sixteen codes, and become bfloat16 without a conversion:
# CHECK:      ([[WORDS]] & 196611) | magic
# CHECK:      (([[WORDS]] >> 14) & 196611) | magic
# CHECK-NOT:  & 196611
# CHECK:      .to(tl.int16).to(tl.bfloat16, bitcast=True)
# CHECK:      (w_linear >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
# CHECK-NOT:  tl.load(
# CHECK:      tl.dot(w_linear, x, acc_linear)
# CHECK:      tl.where([[Y:\w+]] < 0, 0.0, [[Y]])
# CHECK:      tl.store({{.*}}.to(tl.int64) * 201 + [[N]]{{.*}}, {{.*}}.to(tl.bfloat16), mask=[[IN_M]] & [[IN_N]]
# CHECK-NOT:  tl.store
# CHECK:      def [[SOME:\w+_some]](
# CHECK:      tl.dot(
# CHECK:      def [[MANY:\w+_many]](
# CHECK:      tl.dot(
# CHECK:      tl.store(
# The host takes one or another by the number of rows, which is nowhere baked in:
# CHECK:      [[NORM]][(m,)](
# CHECK:      if m <= {{[0-9]+}}:
# CHECK:      [[FEW]][(triton.cdiv(m,
# CHECK:      elif m <= {{[0-9]+}}:
# CHECK:      [[SOME]][(triton.cdiv(m,
# CHECK:      else:
# CHECK:      [[MANY]][(triton.cdiv(m,
