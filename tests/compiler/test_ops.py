"""The dialect: every op runs, has a right fake and a right derivative, and means what its formula says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fuseline.compiler import ops
from fuseline.compiler.cached import CacheScheme
from fuseline.compiler.errors import FuselineError
from fuseline.compiler.hadamard import core, factor, hadamard_matrix
from tests.helpers.models import error


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def codes(top: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randint(0, top, shape, dtype=dtype)


def cached(text: str, values: bool, centred: bool = False) -> list[torch.Tensor | None]:
    """One side of a cache of 64 tokens, 2 heads of 8, blocks of 32 behind a window of 8."""
    scheme = CacheScheme.parse(text)
    shapes = scheme.shapes(2, 64, 8, 32, values)
    parts = [codes(255, torch.uint8, 1, *shapes["codes"]), torch.rand(1, *shapes["scale"])]
    parts += [torch.rand(1, *shapes["scale"]) if scheme.low else None]
    return [*parts, torch.randn(1, 1, 64, 8) if centred else None, torch.randn(1, 2, 40, 8)]


CACHE = (*cached("int4:channel", False), *cached("int8:token:sym", True, centred=True))
EXPERTS, CHOSEN = (r(3, 8, 6), r(3, 6, 4)), torch.tensor([[0, 2], [2, 2], [1, 0], [2, 0], [0, 2]])
BIASES, ROUTED = (r(3, 8), r(3, 6)), (CHOSEN, r(5, 2))
WORDS = (torch.randint(-(2**15), 2**15, (2, 8, 6), dtype=torch.int16), codes(2**15 - 1, torch.int16, 2, 6, 4))
PLACES = (torch.tensor([0, 1, 0], dtype=torch.int32), torch.tensor([1, 2, 0], dtype=torch.int32))
PLACES_OF_TWO = (PLACES[0], torch.tensor([1, 0, 0], dtype=torch.int32))
WORDS[0][1], WORDS[1][1] = (torch.randn(*s).bfloat16().view(torch.int16) for s in ((8, 6), (6, 4)))
LABELS = torch.tensor([3, -100, 0, 8, 3, -100, 5])
CASES: dict[str, list[tuple[Any, ...]]] = {
    "cache_write": [
        (*cached("int4:channel", False), torch.randn(1, 2, 3, 8), torch.tensor([38]), "int4:channel", 32, False),
        (*cached("fp8:token", True, centred=True), torch.randn(1, 2, 50, 8), torch.tensor(0), "fp8:token", 32, True),
    ],
    "cache_read": [(*cached("int2:token:g4", True), torch.tensor([50]), "int2:token:g4", 32, True)],
    "cache_attention": [
        (
            torch.randn(1, 4, 2, 8), *CACHE, torch.tensor(50), torch.rand(1, 1, 2, 64) > 0.3, 0.3, "full",
            "int4:channel", "int8:token:sym", 32,
        ),
        (
            torch.randn(1, 2, 1, 8), *CACHE, torch.tensor(50), None, 0.3, "causal", "int4:channel", "int8:token:sym",
            32, 49, 0, 5.0,
        ),
    ],
    "rms_norm": [(r(2, 3, 8), r(8), 1e-6), (r(2, 8), None, 1e-6), (r(2, 8), r(8), 1e-6, True, torch.float64, False)],
    "layer_norm": [(r(2, 3, 8), r(8), r(8), 1e-5), (r(2, 8), None, None, 1e-5)],
    "rotary": [(r(2, 4, 3, 8), r(3, 8), r(3, 8))],
    "glu": [(r(2, 8), r(2, 8), name) for name in ("silu", "gelu", "gelu_tanh", "sigmoid")],
    "attention": [
        (r(2, 4, 5, 8), r(2, 2, 5, 8), r(2, 2, 5, 6), None, 0.3, "causal"),
        (r(1, 2, 3, 8), r(1, 2, 7, 8), r(1, 2, 7, 8), None, 0.3, "causal", 4),
        (r(1, 2, 6, 8), r(1, 2, 6, 8), r(1, 2, 6, 8), None, 0.3, "sliding", 0, 3),
        (r(1, 2, 3, 8), r(1, 1, 5, 8), r(1, 1, 5, 8), torch.rand(1, 1, 3, 5) > 0.3, 0.3, "full", 0, 0, 5.0),
    ],
    "moe": [
        (r(5, 6), *ROUTED, *EXPERTS), (r(5, 6), *ROUTED, *EXPERTS, *BIASES, "gelu_tanh", True),
        (r(5, 6), *ROUTED, *EXPERTS, *BIASES, "clamped_swiglu", True, 1.3, 0.5),
        (r(5, 6), *ROUTED, EXPERTS[0], EXPERTS[1].detach(), None, BIASES[1], "gelu"),
        (r(5, 6), *ROUTED, *EXPERTS, None, None, "relu"), (r(5, 6), *ROUTED, *EXPERTS, None, None, "sigmoid"),
        (r(5, 6).detach(), *ROUTED, *(w.detach().transpose(1, 2).contiguous().transpose(1, 2) for w in EXPERTS)),
    ],
    "moe_backward": [
        (r(5, 6).detach(), r(5, 6).detach(), CHOSEN, torch.rand(5, 2), *(w.detach() for w in EXPERTS), None,
         BIASES[1].detach(), "silu", False, 1.0, 1.0, experts) for experts in (True, False)
    ],
    "moe_pairs": [
        (r(5, 6), *ROUTED, *WORDS, *PLACES), (r(5, 6), *ROUTED, *WORDS, *PLACES, *BIASES, "clamped_swiglu", True),
    ],
    "decode_pairs": [
        (codes(255, torch.uint8, 2, 3, 6), torch.rand(2, 3, 2), *PLACES_OF_TWO, "int4", 8, torch.float32),
        (codes(255, torch.uint8, 2, 3, 10), torch.rand(2, 3, 1), *PLACES_OF_TWO, "fp8", 8, torch.bfloat16),
    ],
    "decode_pair_words": [
        (codes(2**30, torch.int32, 1, 1, 64, 48), torch.rand(2, 3, 4), *PLACES_OF_TWO, "int4", 32, 16, torch.float32),
        (codes(2**30, torch.int32, 1, 1, 64, 80), torch.rand(2, 1, 4), *PLACES_OF_TWO, "fp8", 8, 16, torch.bfloat16),
    ],
    "lowrank_add": [
        (r(3, 4, 6), r(5, 4), r(5, 6), [2, 0, 3]),
        (r(3, 4, 6), r(5, 4), r(5, 6), [2, 0, 3], torch.tensor([0, 2, 2, 5], dtype=torch.int32)),
    ],
    "linear_cross_entropy": [
        (r(7, 6), r(9, 6), None, LABELS, None),
        (r(7, 6), r(9, 6), r(9), LABELS, torch.rand(9, dtype=torch.float64), 2, -100, 0.0, 0.5, 4.0, None, 3),
        (r(7, 6), r(9, 6), None, LABELS, None, 0, -100, 0.1, 1.0, 0.0, torch.float64, 2),
    ],
    "linear_cross_entropy_gradients": [
        (r(7, 6).detach(), r(9, 6).detach(), None, LABELS, None, None, True, False, False, 1, -100, 0.1, 0.5, 3.0),
        (torch.randn(7, 6), torch.randn(9, 6), torch.randn(9), LABELS, None, torch.rand(7), True, True, True, 0),
    ],
    "hadamard": [
        (r(2, 3, 8),), (r(2, 24), core(12)), (r(2, 12), core(3)), (r(2, 24), r(3, 3), 6),
        (r(2, 12), core(12).double(), 12, True), (r(2, 8), None, 1),
    ],
    "quantize": [(torch.randn(2, 3, 8), 8, 8), (torch.randn(2, 8), 8, 4)],
    "quantize_affine": [(torch.randn(2, 3, 8), 4, 8), (torch.randn(2, 8), 8, 4)],
    "dequantize": [
        (codes(255, torch.uint8, 3, 8), torch.rand(3, 4), codes(15, torch.uint8, 3, 4), 4, 4, torch.float32),
        (codes(127, torch.int8, 3, 8), torch.rand(3, 1), None, 8, 8, torch.bfloat16),
    ],
    "sparse_linear": [
        (r(2, 3, 8), r(8, 6), torch.tensor([0.4])), (r(2, 8), r(8, 6), torch.rand(8), r(2, 8), r(2, 6), r(6)),
        (r(3, 8), r(8, 6), torch.tensor([0.4]), None, None, r(6), 2),
    ],
    "embedding_gradient": [(r(2, 3, 8), codes(5, torch.int64, 2, 3), 5, -1), (r(3, 8), LABELS[4:] % 5, 5, 0)],
    "encode": [
        (torch.randn(2, 3, 8), "e4m3", 8), (torch.randn(2, 8), "ternary", 4), (torch.randn(2, 8), "int8", 0),
        (torch.randn(2, 32).half(), "nvfp4", 16),
    ],
    "encode_at": [
        (torch.randn(2, 3, 8), torch.rand(1), None, "e2m1"), (torch.randn(2, 8), torch.rand(1), None, "int8"),
        (torch.randn(2, 8).half(), torch.rand(1), codes(255, torch.uint8, 1), "int8"),
    ],
    "decode": [
        (
            codes(255, torch.uint8, 3, 3), torch.rand(3, 2), codes(7, torch.uint8, 3, 2), None, "int3", 4, True,
            torch.float32,
        ),
        (codes(255, torch.uint8, 3, 16), codes(200, torch.uint8, 3, 1), None, None, "mxfp4", 32, True, torch.bfloat16),
        (codes(15, torch.uint8, 3, 8), torch.rand(1, 1), None, torch.rand(1), "e2m1", 8, False, torch.float16),
    ],
    "fake_quantize": [
        (torch.randn(3, 8), torch.rand(3, 2), "int4", 4), (torch.randn(2, 8).half(), torch.rand(2, 1), "binary", 8),
    ],
    "fake_quantize_backward": [(torch.randn(3, 8), torch.randn(3, 8), torch.rand(3, 2), "midrise2", 4)],
    "round_through": [(torch.randn(3, 8), "int4:g4:sym", True), (torch.randn(2, 3, 8), "int8", False)],
    "staircase": [(torch.randn(3, 8), torch.randn(3).sort().values, torch.rand(1), torch.randn(1))],
    "fake_staircase": [(torch.randn(3, 8), torch.tensor([*[2 / 3] * 3, -1.0, 0.5, 2.0]), 2)],
    "to_host": [(torch.randn(3, 4),), (torch.randn(2, 3, 4).transpose(0, 2),)],
    "from_host": [(torch.randn(3, 4), torch.device("cpu")), (torch.randn(3, 4).t(), torch.device("cpu"))],
    "arrived": [(torch.randn(3, 4),)],
    "after": [(torch.randn(3, 4), [torch.randn(2)])],
    "decode_words": [
        (codes(9, torch.int32, 1, 1, 64, 16), torch.rand(4, 3), codes(9, torch.uint8, 4, 3), None, "int4", 32, 16,
         torch.half),
        (codes(127, torch.int8, 3, 40), torch.rand(1, 3), None, None, "int8", 40, 0, torch.float32),
    ],
}  # fmt: skip
EACH = [pytest.param(name, args, id=f"{name}-{i}") for name, cases in CASES.items() for i, args in enumerate(cases)]


def test_every_op_has_a_case() -> None:
    own = {name for name, op in ops.REGISTRY.items() if op.naive.__module__.startswith("fuseline.")}  # not other tests'
    assert own and own <= set(CASES)


@pytest.mark.parametrize(("name", "args"), EACH)
def test_schema_fake_and_autograd_registration(name: str, args: tuple[Any, ...]) -> None:
    utilities = ["test_schema", "test_faketensor"]
    utilities += [] if any(word in name for word in ("quantize", "code", "cache")) else ["test_autograd_registration"]
    torch.library.opcheck(ops.REGISTRY[name].overload, args, test_utils=utilities)


@pytest.mark.parametrize(("name", "args"), EACH)
def test_the_derivative_is_that_of_the_naive_twin(name: str, args: tuple[Any, ...]) -> None:
    op = ops.REGISTRY[name]
    inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    if not inputs:
        return
    with_op, naive = op(*args), op.naive(*args)
    seed = torch.randn_like(naive)
    assert torch.equal(with_op, naive) or (name == "linear_cross_entropy" and error(with_op, naive) < 1e-15)
    found, expected = torch.autograd.grad(with_op, inputs, seed), torch.autograd.grad(naive, inputs, seed)
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-12


def test_only_what_wants_a_gradient_gets_one() -> None:
    x, w = r(2, 8), r(8)
    (gradient,) = torch.autograd.grad(ops.rms_norm(x, w.detach(), 1e-6).sum(), [x])
    assert gradient.shape == x.shape
    with torch.no_grad():
        assert not ops.rms_norm(x, w, 1e-6).requires_grad


def formula_attention(q, k, v, visible, scale, cap=0.0):
    group = q.shape[1] // k.shape[1]
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            logits = q[b, h] @ k[b, h // group].t() * scale
            logits = cap * torch.tanh(logits / cap) if cap else logits
            logits = torch.where(visible, logits, torch.full_like(logits, -1e300))
            out[b, h] = torch.softmax(logits, -1) @ v[b, h // group]
    return out


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "offset", "window", "rule"),
    [
        ("full", 0, 0, lambda i, j: True), ("causal", 0, 0, lambda i, j: j <= i),
        ("causal", 3, 0, lambda i, j: j <= i + 3), ("sliding", 3, 2, lambda i, j: i + 3 - 2 < j <= i + 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cap", [0.0, 4.0])
def test_attention_is_its_formula(kind: str, offset: int, window: int, rule: Callable, cap: float) -> None:
    q, k, v = r(2, 4, 3, 8), r(2, 2, 6, 8), r(2, 2, 6, 5)
    visible = torch.tensor([[bool(rule(i, j)) for j in range(6)] for i in range(3)])
    expected = formula_attention(q, k, v, visible, 0.4, cap)
    assert error(ops.attention(q, k, v, None, 0.4, kind, offset, window, cap), expected) < 1e-12
    padding = torch.tensor([True, True, False, True, True, True])
    expected = formula_attention(q, k, v, visible & padding | torch.eye(3, 6, dtype=torch.bool), 0.4, cap)
    mask = padding | torch.eye(3, 6, dtype=torch.bool)
    if kind == "full":
        assert error(ops.attention(q, k, v, mask, 0.4, kind, offset, window, cap), expected) < 1e-12
        added = torch.zeros(3, 6, dtype=torch.float64).masked_fill(~mask, float("-inf"))
        assert error(ops.attention(q, k, v, added, 0.4, kind, offset, window, cap), expected) < 1e-12


@torch.no_grad()
def test_norms_and_rotary_are_their_formulas() -> None:
    x, w = r(3, 8), r(8)
    root = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert error(ops.rms_norm(x, w, 1e-6), x / root * w) < 1e-12
    assert error(ops.rms_norm(x, w, 1e-6, True), x / root * (1 + w)) < 1e-12
    assert error(ops.layer_norm(x, w, w, 1e-5), F.layer_norm(x, (8,), w, w, 1e-5)) < 1e-12
    angle = torch.randn(3, 4, dtype=torch.float64)
    turned = ops.rotary(x, torch.cat((angle.cos(),) * 2, -1), torch.cat((angle.sin(),) * 2, -1))
    as_complex = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones_like(angle), angle)
    assert error(turned, torch.cat((as_complex.real, as_complex.imag), -1)) < 1e-12


@torch.no_grad()
def test_16_bit_norms_cast_where_they_say() -> None:
    x, w = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(ops.rms_norm(x, w, 1e-6, False, torch.float32, True), wide.bfloat16() * w)
    assert torch.equal(ops.rms_norm(x, w, 1e-6, True, torch.float32, False), (wide * (1 + w.float())).bfloat16())


def test_quantize_has_the_stated_error_and_scale() -> None:
    x = torch.randn(4, 32) * torch.tensor([[1e-3], [1.0], [50.0], [0.0]])
    codes, scale = ops.quantize(x, 8, 16)
    assert codes.dtype == torch.int8 and scale.shape == (4, 2) and scale[3].eq(1).all()
    back = ops.dequantize(codes, scale, None, 8, 16, torch.float32)
    assert ((back - x).abs() <= scale.repeat_interleave(16, -1) / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", (8, 4, 2))
def test_quantize_affine_has_the_stated_error_scale_and_zero(bits: int) -> None:
    x = torch.rand(5, 32) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [-2.0]]) - torch.tensor(
        [[0], [0.3], [9], [0], [0]]
    )
    codes, scale, zero = ops.quantize_affine(x, bits, 16)
    assert codes.dtype == zero.dtype == torch.uint8 and scale.shape == zero.shape == (5, 2) and scale[3].eq(1).all()
    assert codes.max() <= 2**bits - 1 and zero[0].eq(0).all() and zero[4].eq(2**bits - 1).all()
    back = ops.dequantize(codes, scale, zero, 8, 16, torch.float32)
    # the zero point is rounded too, so that either end of the range may be cut by half a step
    assert ((back - x).abs() <= scale.repeat_interleave(16, -1) * (1 + 1e-5)).all()
    assert torch.equal(
        ops.dequantize(*ops.quantize_affine(torch.zeros(1, 8), 4, 8), 8, 8, torch.float32), torch.zeros(1, 8)
    )


def test_ops_are_opaque_to_capture() -> None:
    import fuseline

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.fuseline.glu(torch.ops.fuseline.rms_norm(x, None, 1e-6), x, "silu")

    program = fuseline.capture(Net(), (torch.randn(2, 8),))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        ops.rms_norm.overload, ops.glu.overload,
    ]  # fmt: skip
    assert ops.find(torch.ops.aten.add.Tensor) is None and ops.find(len) is None


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 8, 12, 24, 36, 6, 47, 576])
def test_hadamard_is_a_product_with_the_matrix(n: int) -> None:
    split, x = factor(n), r(2, 3, n)
    dense = core(split.order) if split.order > 1 else None
    assert error(ops.hadamard(x, dense), x @ hadamard_matrix(n)) < 1e-14
    assert error(ops.hadamard(ops.hadamard(x, dense), dense), x) < 1e-14
    blocks = torch.block_diag(hadamard_matrix(n), hadamard_matrix(n))
    wide = torch.cat((x, x + 1), -1)
    assert error(ops.hadamard(wide, dense, n), wide @ blocks) < 1e-14


@torch.no_grad()
def test_a_core_that_is_not_symmetric_is_multiplied_from_the_right() -> None:
    x, rotation = r(2, 10), torch.linalg.qr(r(5, 5)).Q.contiguous()
    assert error(ops.hadamard(x, rotation), x @ torch.kron(rotation, hadamard_matrix(2))) < 1e-14


@torch.no_grad()
def test_hadamard_of_half_precision_is_rounded_once() -> None:
    x = torch.randn(4, 768).bfloat16()
    assert torch.equal(ops.hadamard(x, core(12)), ops.hadamard(x.float(), core(12)).bfloat16())
    assert error(ops.hadamard(x, core(12)), x.double() @ hadamard_matrix(768)) < 2**-8


@pytest.mark.parametrize(
    ("n", "order", "block", "words"),
    [
        (12, 1, 0, "12 channels are not 1 times a power of two"),
        (24, 5, 0, "24 channels are not 5 times a power of two"),
        (24, 1, 16, "blocks of 16 do not divide 24 channels"),
    ],
)
def test_sizes_that_hadamard_cannot_take(n: int, order: int, block: int, words: str) -> None:
    dense = torch.eye(order) if order > 1 else None
    for x in (torch.zeros(2, n), torch.zeros(2, n, device="meta")):
        with pytest.raises(FuselineError, match=words):
            ops.hadamard(x, dense if dense is None else dense.to(x.device), block)
