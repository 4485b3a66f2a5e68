"""What only looks like a norm stays as it was written, and each refusal says what stands in the way."""

import torch

import fuseline
from fuseline.compiler.observe import Print


class LookAlikes(torch.nn.Module):
    def forward(self, x, eps):
        over_columns = x * torch.rsqrt((x * x).mean(0, keepdim=True) + 1e-6)
        tensor_eps = over_columns * torch.rsqrt((over_columns * over_columns).mean(-1, keepdim=True) + eps)
        return tensor_eps / torch.sqrt((tensor_eps * tensor_eps).sum(-1, keepdim=True) / 7 + 1e-6)


program = fuseline.capture(LookAlikes(), (torch.randn(3, 8), torch.rand(3, 1)))
_, report = fuseline.Pipeline("raise{allow_empty}").run(program, [Print("raise", print)])
for reason in report["raise"].refused.values():
    print("refused:", reason)

# CHECK-LABEL: # after raise{allow_empty}: 0 rewrites, 3 refused
# CHECK-NOT:   torch.ops.fuseline
# CHECK:       torch.ops.aten.mean.dim({{\w+}}, [0], True)
# CHECK:       torch.ops.aten.mean.dim({{\w+}}, [-1], True)
# CHECK:       torch.ops.aten.div.Tensor({{\w+}}, 7)
# CHECK-NOT:   torch.ops.fuseline
# CHECK:       return
# CHECK-DAG:   refused: the mean runs over the dimensions [0] of 2, not over the last one
# CHECK-DAG:   refused: ε is the tensor 'eps', not a number
# CHECK-DAG:   refused: the sum of 8 squares is divided by 7
