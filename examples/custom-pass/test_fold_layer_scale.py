import fold_layer_scale  # noqa: F401  registers the pass
import pytest
import torch

import fuseline


class Block(torch.nn.Module):
    """[batch, 8] → [batch, 8]"""

    def __init__(self, bias=True, scale=(8,)):
        super().__init__()
        self.fc = torch.nn.Linear(8, 8, bias=bias)
        self.scale = torch.nn.Parameter(torch.rand(scale) + 0.5)

    def forward(self, x):
        return x + self.scale * self.fc(x)


@pytest.mark.parametrize("bias", [True, False])
def test_before_and_after(bias):
    block, x = Block(bias), torch.randn(3, 8)
    with torch.no_grad():
        program, report = fuseline.Pipeline("fold-layer-scale").run(fuseline.capture(block, (x,)))
        ops = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert ops == ["aten.linear.default", "aten.add.Tensor"] and report["fold-layer-scale"].matched == 1
        torch.testing.assert_close(program.to_module()(x), block(x))


def test_a_scale_of_another_shape_is_refused():
    with torch.no_grad(), pytest.raises(fuseline.UserError, match="not one number for each output"):
        fuseline.Pipeline("fold-layer-scale").run(fuseline.capture(Block(scale=(1,)), (torch.randn(3, 8),)))


def test_training_is_left_alone():
    model = fuseline.optimize(Block(), "fold-layer-scale{allow_empty}")
    model(torch.randn(3, 8)).sum().backward()
    assert model.scale.grad is not None
