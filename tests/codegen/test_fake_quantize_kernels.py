"""The hand-written kernels of fake quantization compile for the GPUs that generated ones do."""

from __future__ import annotations

import pytest

from fuseline.codegen.offline import TARGETS
from fuseline.compiler.formats.learned import LEAST
from fuseline.compiler.ops.fake_quantize import rule_of
from fuseline.runtime.fake_quantize import numbers_of

triton = pytest.importorskip("triton")


@pytest.mark.one_in(6)
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target: str, dtype: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fuseline.runtime import fake_quantize_kernels as kernels

    common = {"SHORT": dtype == "bf16", "GROUP": 576, "BLOCK": 1024}
    learned = {**numbers_of("midrise2"), **common}
    value, alpha, number = f"*{dtype}", "*fp32", "fp32"
    rule = rule_of("midrise2")
    assert LEAST > 0 and rule.unit == 2
    cases = {
        "learned_forward": ((value, alpha, value, number, number), learned),
        "learned_backward": ((value, value, alpha, value, alpha, *[number] * 7), learned | {"FOLLOWS": True}),
        "largest_forward": ((value, value, number, number, number), common),
    }
    for name, (kinds, constants) in cases.items():
        function = getattr(kernels, name)
        signature = dict(zip(function.arg_names, kinds, strict=False)) | dict.fromkeys(constants, "constexpr")
        compiled = triton.compile(ASTSource(function, signature, constants), target=GPUTarget(*TARGETS[target]))
        assert compiled.asm.get("cubin") or compiled.asm["hsaco"]
