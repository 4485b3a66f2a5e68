"""`raise` on a model written by hand, in float64 without casts; and at the borders of autograd and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fuseline.compiler import capture as captures
from fuseline.compiler.capture import capture
from fuseline.compiler.observe.numerics import error
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.registry import find
from fuseline.compiler.report import PassReport
from fuseline.passes.raising import Raise
from tests.passes.families import described, through_dynamo
from tests.passes.raise_helpers import Force


class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * (1 + self.weight)


class Block(nn.Module):
    """Grouped attention with rotary halves and a sliding window, and a gated unit from one linear."""

    def __init__(self, size: int = 16, heads: int = 4, kv: int = 2):
        super().__init__()
        self.heads, self.kv = heads, kv
        self.first, self.second = Norm(size), Norm(size)
        self.qkv = nn.Linear(size, size + 2 * kv * (size // heads))
        self.out, self.down = nn.Linear(size, size), nn.Linear(24, size)
        self.gate_up = nn.Linear(size, 48)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, s, c = x.shape
        d = c // self.heads
        q, k, v = self.qkv(self.first(x)).split([c, self.kv * d, self.kv * d], -1)
        q, k, v = (t.view(b, s, -1, d).transpose(1, 2) for t in (q, k, v))
        q, k = (t * cos + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], -1) * sin for t in (q, k))
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        i, j = torch.arange(s)[:, None], torch.arange(s)[None]
        scores = (q @ k.mT / d**0.5).masked_fill((j > i) | (j <= i - 4), float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, c))
        gate, up = self.gate_up(self.second(x)).chunk(2, -1)
        return x + self.down(F.relu(gate) * up)


class Model(nn.Module):
    def __init__(self, layers: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), 10.0 ** -torch.arange(2, dtype=x.dtype))
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().double().eval()


def rules(layers: int) -> dict[str, int]:
    return {
        "RMSNorm": 2 * layers, "RotaryPair": layers, "ReGLU": layers, "Attention": layers, "RepeatedHeads": layers,
    }  # fmt: skip


def test_float64_bound_and_symbolic_length(model: Model) -> None:
    program = capture(model, (torch.randn(2, 7, 16, dtype=torch.float64),), dynamic=({1: torch.export.Dim.AUTO},))
    after, report = Pipeline("raise").run(program, verification="full")
    assert report["raise"].rules == rules(3) and not report["raise"].refused
    assert described(after) == [("sliding", 4)] * 3
    module = after.to_module()
    for length in (2, 7, 12):
        x = torch.randn(2, length, 16, dtype=torch.float64)
        assert error(module(x), model(x)) < 1e-12


def test_float64_gradients(model: Model) -> None:
    x = torch.randn(2, 7, 16, dtype=torch.float64)

    def step(m: nn.Module) -> None:
        m(x).square().sum().backward()

    step(model)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (graph,) = through_dynamo(model, step)
    assert graph.report.rules == rules(3)
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, expected[name]) < 1e-9, name


def test_in_bfloat16_too() -> None:
    torch.manual_seed(0)
    model = Model().bfloat16().eval()
    x = torch.randn(2, 7, 16).bfloat16()
    program = capture(model, (x,))
    after, report = Pipeline("raise").run(program, verification="full")
    assert report["raise"].rules == rules(3)
    reference = Model().double()
    reference.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    noise = error(model(x), reference(x.double()))
    assert error(after.to_module()(x), reference(x.double())) < 2 * noise


def compiled(function: Any, *inputs: torch.Tensor) -> tuple[captures.Program, PassReport]:
    """The program and the report of a function under Dynamo, with gradients recorded."""
    found: list[Any] = []

    def backend(module: torch.fx.GraphModule, example: Any) -> Any:
        program = captures.from_dynamo(module, example)
        _, report = Pipeline("raise{allow_empty}").run(program)
        found.append((program, report["raise"]))
        return module.forward

    torch.compiler.reset()
    torch.compile(function, backend=backend)(*inputs)
    torch.compiler.reset()
    return found[0]


def test_nothing_reaches_across_no_grad() -> None:
    """A norm whose statistics carry no gradient is not RMSNorm for autograd."""

    def detached(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        return x * scale

    x = torch.randn(3, 8, requires_grad=True)
    program, report = compiled(detached, x)
    assert list(report.refused.values()) == ["part of it runs under torch.no_grad: the whole would get other gradients"]
    (detached(x).pow(3).sum()).backward()
    expected, x.grad = x.grad, None
    torch.ops.fuseline.rms_norm(x, None, 1e-3).pow(3).sum().backward()
    assert error(x.grad, expected) > 1e-2


def test_nothing_is_rewritten_under_autocast() -> None:
    """There `pow` is computed in float32 and a matmul in bfloat16, which the graph's ops do not say."""

    def cast(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = x @ w
            return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3)

    program, report = compiled(cast, torch.randn(3, 8), torch.randn(8, 8))
    assert list(report.refused.values()) == ["it runs under torch.autocast, whose casts are not in the graph"]
    expected = program.run(program.examples)[0]
    h = (program.examples[0] @ program.examples[1]).bfloat16()
    forced = torch.ops.fuseline.rms_norm(h, None, 1e-3)
    assert forced.dtype != expected.dtype or error(forced, expected) > 1e-3


def test_it_is_registered_and_documents_itself() -> None:
    assert find("raise") is Raise
    assert str(Pipeline("raise{allow_empty}")) == "raise{allow_empty}"
    assert "Recognise what a model means" in (__import__(Raise.__module__, fromlist=["x"]).__doc__ or "")
    assert Force().rules
