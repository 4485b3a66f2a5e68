"""The hand-written kernel of fused losses compiles for the GPUs that generated ones do."""

from __future__ import annotations

import pytest

from fuseline.codegen.offline import TARGETS

triton = pytest.importorskip("triton")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_compiles(target: str, dtype: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fuseline.runtime.linear_cross_entropy_kernels import cross_entropy_rows as kernel

    constants = {"VOCABULARY": 128256, "CAPPED": True, "SMOOTHED": True, "WANTS": True, "BLOCK": 8192}
    kinds = (f"*{dtype}", "*i64", "*fp32", "*fp32", "i32", "i32", "fp32", "fp32", "fp32")
    signature = dict(zip(kernel.arg_names, kinds, strict=False)) | dict.fromkeys(constants, "constexpr")
    options = {"num_warps": 16}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), target=GPUTarget(*TARGETS[target]), options=options
    )
    assert compiled.asm.get("cubin") or compiled.asm["hsaco"]
    assert compiled.metadata.shared <= 48 * 1024
