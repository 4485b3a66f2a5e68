"""Attention over a long cache: keys are split among programs, each leaves its part with its maximum and its sum, and a
second kernel joins them. The four query heads of a key head share one read of it."""

import torch

import fuseline
from fuseline.codegen.lower import lower


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


length = torch.export.Dim("length", min=2)
q, k, v = (torch.randn(1, heads, n, 64, dtype=torch.bfloat16) for heads, n in ((8, 1), (2, 300), (2, 300)))
program = fuseline.capture(Attention(), (q, k, v), dynamic=({}, {2: length}, {2: length}))
after, _ = fuseline.Pipeline("raise,fuse").run(program)
print(lower(after).source)

# CHECK:      2 kernels for 1 regions, 0 regions run through PyTorch
# CHECK:      # lines: split_attention_kernel.py:{{[0-9]+}}
# CHECK:      def [[SPLIT:\w+_split]](
# CHECK:      [[KV:\w+]] = {{\w+}} % heads
# CHECK:      head = [[KV]] * G + {{\w+}} % G
# One read of the queries, and in the loop one of the keys and one of the values, masked at the cache's end:
# CHECK:      tl.load(q_rows
# CHECK:      last = min(first + KEYS, T)
# CHECK:      for {{.*}} in range(0, KEYS, BLOCK_T):
# CHECK:      [[IN:\w+]] = [[T:\w+]] < last
# CHECK:      k = tl.load(k_head + [[T]].to(tl.int64)[None, :] * {{.*}}mask=[[IN]][None, :], other=0.0)
# CHECK:      v = tl.load(v_head + [[T]].to(tl.int64)[:, None] * {{.*}}mask=[[IN]][:, None], other=0.0)
# CHECK-NOT:  tl.load
# The softmax runs along, in base 2, in float32; a key that is not seen weighs nothing:
# CHECK:      tl.where(seen, logits, float("-inf"))
# CHECK:      tl.exp2(
# CHECK:      tl.dot(p.to(v.dtype), v)
# CHECK-NOT:  tl.load
# CHECK:      tl.store(parts_ptr
# CHECK:      tl.store(stats_ptr
# CHECK:      tl.store(stats_ptr
# CHECK:      def [[JOIN:\w+_join]](
# CHECK-DAG:  tl.load(stats_ptr
# CHECK-DAG:  tl.load(parts_ptr
# A row that saw no key at all is zeros, not NaN:
# CHECK:      acc / tl.where(total == 0.0, 1.0, total)
# CHECK:      tl.store(out, {{.*}}.to(out_ptr.dtype.element_ty))
# Parts are kept in float32; the split is launched before the join:
# CHECK:      torch.empty({{.*}}dtype=torch.float32
# CHECK:      [[SPLIT]][(
# CHECK:      [[JOIN]][(
