"""What each pass makes of a program, by structure: the program after it is the expected one, written by hand.

Both are captured the same way; `same_structure` compares ops, arguments, types and weight expressions, in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fuseline
from fuseline import Pipeline, Program
from fuseline.compiler.expressions import Expression, Output, Pack, Param, Quantize
from fuseline.compiler.schemes import Scheme
from fuseline.compiler.stage import load_stage, render
from fuseline.compiler.structure import same_structure
from fuseline.compiler.traits import arguments

dialect = torch.ops.fuseline


class Layer(torch.nn.Module):
    """What the programs below share: their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.ones(8))
        self.gate = torch.nn.Parameter(torch.randn(16, 8))
        self.up = torch.nn.Parameter(torch.randn(16, 8))
        self.down = torch.nn.Parameter(torch.randn(8, 16))


class Norm(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)) + x


class NormRaised(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dialect.rms_norm(x, self.norm, 1e-5) + x


class Gated(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class GatedRaised(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(dialect.glu(F.linear(x, self.gate), F.linear(x, self.up), "silu"), self.down)


class Turned(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        def turn(x: torch.Tensor) -> torch.Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat((-b, a), -1) * sin

        return turn(q) + turn(k)


class TurnedRaised(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return dialect.rotary(q, cos, sin) + dialect.rotary(k, cos, sin)


class Attention(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)


class AttentionRaised(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return dialect.attention(q, k, v, None, 0.5, "causal")


def written_out(program: Program) -> Program:
    """The program with the dialect's arguments in full: tracers and rules leave out those that are the default."""
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", "") == "fuseline":
            node.args, node.kwargs = tuple(arguments(node).values()), {}
    return program


HEADS = (torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
TURNED = (torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(5, 8), torch.randn(5, 8))


@pytest.mark.parametrize(
    ("before", "after", "inputs"),
    [
        (Norm, NormRaised, (torch.randn(3, 8),)),
        (Gated, GatedRaised, (torch.randn(3, 8),)),
        (Turned, TurnedRaised, TURNED),
        (Attention, AttentionRaised, HEADS),
    ],
)
def test_raise(before: type[torch.nn.Module], after: type[torch.nn.Module], inputs: tuple[torch.Tensor, ...]) -> None:
    program, expected = fuseline.capture(before(), inputs), written_out(fuseline.capture(after(), inputs))
    raised, _ = Pipeline("raise").run(program, verification="full")
    assert same_structure(written_out(raised), expected) and not same_structure(program, expected)
    again, _ = Pipeline("raise{allow_empty}").run(expected)
    assert same_structure(again, expected), "raising what is raised changes nothing"


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(32, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x))


class LinearQuantized(torch.nn.Module):
    """The same with codes, scales and zero points as buffers: two codes a byte, groups of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(6))
        self.register_buffer("codes", torch.zeros(6, 16, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(6, 2))
        self.register_buffer("zero", torch.zeros(6, 2, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = dialect.quantize(x, 8, 32)
        rounded = dialect.dequantize(codes, scale, None, 8, 32, torch.float32)
        weight = dialect.dequantize(self.codes, self.scale, self.zero, 4, 16, torch.float32)
        return torch.relu(F.linear(rounded, weight, self.bias))


def standing_for(program: Program, weights: Mapping[str, Expression]) -> Program:
    """The program with its parameters replaced by expressions."""
    for node in program.weights():
        node.meta["weight"] = weights[node.meta["weight"].name]
    return program


def test_quantize() -> None:
    x = torch.randn(3, 32)
    program, expected = fuseline.capture(Linear(), (x,)), fuseline.capture(LinearQuantized(), (x,))
    scheme = Scheme("int4", group=16, symmetric=False)
    rounded = Quantize(Param("fc.weight"), scheme)
    weights: dict[str, Expression] = {
        "bias": Param("fc.bias"),
        "codes": Pack(Output(rounded, "codes"), scheme),
        "scale": Output(rounded, "scale"),
        "zero": Output(rounded, "zero"),
    }
    quantized, _ = Pipeline("quantize{weights=int4:g16,activations=int8}").run(program, verification="full")
    assert not same_structure(quantized, written_out(expected)), "weights count"
    assert same_structure(written_out(quantized), standing_for(expected, weights))


FUSED = """
    def forward(self, x, norm, gate, up, down):
        y = self.gated(x, norm, gate, up)
        z = self.summed(y, down, x)
        w = torch.ops.aten.sum.default(z)
        return (w,)

    def gated(self, x, norm, gate, up):
        h = torch.ops.fuseline.rms_norm.default(x, norm, 1e-05)
        g = torch.ops.aten.linear.default(h, gate)
        u = torch.ops.aten.linear.default(h, up)
        y = torch.ops.fuseline.glu.default(g, u, 'silu')
        return y

    def summed(self, y, down, x):
        d = torch.ops.aten.linear.default(y, down)
        z = torch.ops.aten.add.Tensor(x, d)
        return z
"""


class Block(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = dialect.rms_norm(x, self.norm, 1e-5)
        y = dialect.glu(F.linear(h, self.gate), F.linear(h, self.up), "silu")
        return (x + F.linear(y, self.down)).sum()


def stage(program: Program, path: Path, code: str | None = None, kinds: Mapping[str, str] | None = None) -> Program:
    """The program through a stage's text, with other code and the kinds of its regions."""
    text = render(program, "a program")
    if code is not None:
        start, end = text.index("    def forward("), text.index("\n\n\nSTAGE = ")
        text = (text[:start] + code.strip("\n") + text[end:]).replace(
            "'regions': {}", f"'regions': {dict(kinds or {})}"
        )
    path.write_text(text)
    return load_stage(path)


def test_fuse(tmp_path: Path) -> None:
    program = fuseline.capture(Block(), (torch.randn(3, 8),))
    expected = stage(program, tmp_path / "expected.py", FUSED, {"gated": "linear", "summed": "linear"})
    fused, _ = Pipeline("fuse").run(program, verification="full")
    assert same_structure(stage(fused, tmp_path / "fused.py"), expected)
    assert not same_structure(stage(program, tmp_path / "before.py"), expected)
    other = FUSED.replace("add.Tensor(x, d)", "add.Tensor(d, x)")
    assert not same_structure(stage(program, tmp_path / "other.py", other), expected), "what is in a region counts"
