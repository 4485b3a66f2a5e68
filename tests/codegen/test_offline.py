"""One kernel of each family compiles for three GPUs that this machine does not have."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fuseline.codegen.kernel import Kernel
from fuseline.codegen.offline import TARGETS, CompileError, compile_kernel
from fuseline.compiler.errors import UserError
from fuseline.compiler.ops import dequantize, glu, layer_norm, quantize, rms_norm, rotary
from tests.codegen.regions import emitted


def _elementary(x: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(x) + torch.exp(x).log1p() + torch.erf(x) + torch.sin(x) * torch.cos(x)
    y = y + torch.sqrt(x.abs()) + torch.rsqrt(x.abs() + 1) + x.abs() ** 0.75 + torch.round(x) + torch.floor(x)
    return torch.nn.functional.gelu(y) + torch.nn.functional.silu(y).clamp(-1, 1) + y**3


def _integers(k: torch.Tensor, j: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return k // j + (k % j) * 3, (k > j) & (j != 0), (k << 1).to(torch.int8), k.amax(-1), (k > 2).sum(-1)


def _fold(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = x + r
    return h, *quantize(rms_norm(h, w, 1e-6, False, torch.float32), 8, 96)


def _heads(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    heads = rms_norm(x.view(x.shape[0], x.shape[1], 3, 16), w, 1e-6, False, torch.float32)
    return rotary(heads.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1))


def _half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


BOTH = {0: (0, 1), 1: (0, 1)}
FAMILIES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], dict[int, tuple[int, ...]]]] = {
    "elementary float32": (_elementary, (torch.randn(4, 200),), {0: (0,)}),
    "elementary float64": (_elementary, (torch.randn(4, 200, dtype=torch.float64),), {}),
    "integers": (_integers, (torch.randint(9, (4, 30)), torch.randint(1, 9, (4, 30))), {}),
    "residual, norm, quantize": (_fold, (_half(2, 5, 96), _half(2, 5, 96), _half(96)), BOTH),
    "layer_norm float16": (
        lambda x, w, b: layer_norm(x, w, b, 1e-5),
        (torch.randn(4, 96).half(), torch.randn(96).half(), torch.randn(96).half()),
        {},
    ),
    "softmax in a loop": (
        lambda x: torch.softmax(x, -1, dtype=torch.float32).to(x.dtype),
        (_half(3, 50),),
        {0: (0, 1)},
    ),
    "groups": (lambda x: quantize(x, 4, 32), (_half(3, 96),), {}),
    "dequantize": (
        lambda c, s: dequantize(c, s, None, 4, 32, torch.bfloat16),
        (torch.randint(0, 255, (6, 48), dtype=torch.uint8), torch.rand(6, 3)),
        {},
    ),
    "norm, rotary": (
        _heads,
        (_half(2, 5, 48), _half(16), _half(2, 5, 16), _half(2, 5, 16)),
        {0: (0, 1), 2: (0, 1), 3: (0, 1)},
    ),
    "glu of halves": (lambda x: glu(*x.chunk(2, -1), "silu"), (_half(3, 256),), {0: (0,)}),
    "cat": (lambda x, y: torch.cat((x, y), 1) * 2, (_half(2, 3, 6), _half(2, 4, 6)), {0: (1,), 1: (1,)}),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_for_every_target(family: str) -> None:
    function, inputs, dynamic = FAMILIES[family]
    (kernel,) = emitted(function, *inputs, dynamic=dynamic).kernels
    for target in TARGETS:
        compiled = compile_kernel(kernel, target)
        assert compiled.asm["amdgcn" if target == "gfx942" else "ptx"]
        assert compiled.num_warps == kernel.num_warps and compiled.shared_bytes >= 0


@pytest.mark.parametrize("family", ("residual, norm, quantize", "softmax in a loop", "norm, rotary", "cat"))
def test_compiles_as_the_launcher_specialises_it(family: str) -> None:
    """Triton makes an argument that is 1 a constant, and one beyond 2^31 an i64."""
    function, inputs, dynamic = FAMILIES[family]
    (kernel,) = emitted(function, *inputs, dynamic=dynamic).kernels
    integers = [name for name, kind in kernel.signature.items() if kind == "i32"]
    ones = {name: 1 for name in integers if name != "rows"}
    constant = {name: "constexpr" if name in ones else kind for name, kind in kernel.signature.items()}
    wide = {name: "i64" if name in integers else kind for name, kind in kernel.signature.items()}
    compile_kernel(replace(kernel, signature=constant, constants={**kernel.constants, **ones}), "sm_90")
    compile_kernel(replace(kernel, signature=wide), "sm_90")


def test_equal_kernels_are_compiled_once() -> None:
    a = emitted(lambda x: x + 1, torch.randn(4, 6)).kernels[0]
    b = Kernel("renamed", a.source.replace(a.name, "renamed"), a.signature, a.constants, ("other",))
    first, second = compile_kernel(a, "sm_90"), compile_kernel(b, "sm_90")
    assert first.asm is second.asm and second.kernel is b


def test_addresses_stay_64_bits_wide() -> None:
    ptx = compile_kernel(emitted(lambda x: x + 1, torch.randn(4, 6), dynamic={0: (0, 1)}).kernels[0], "sm_90").asm[
        "ptx"
    ]
    assert isinstance(ptx, str) and "mul.wide.s32" in ptx or "mul.lo.s64" in ptx


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = emitted(lambda x: x + 1, torch.randn(4, 6)).kernels[0]
    with pytest.raises(UserError, match="unknown target 'sm_9'") as caught:
        compile_kernel(kernel, "sm_9")
    assert "sm_90" in str(caught.value)
    wrong = Kernel(
        "wrong", "@triton.jit\ndef wrong(x_ptr):\n    tl.store(x_ptr, tl.nothing(1))\n", {"x_ptr": "*fp32"}, {}
    )
    with pytest.raises(CompileError, match="kernel wrong does not compile for sm_80"):
        compile_kernel(wrong, "sm_80")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton is not installed"):
        compile_kernel(wrong, "sm_80")
