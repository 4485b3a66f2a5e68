"""Every kernel of the demo's programs compiles for three targets without a GPU."""

from __future__ import annotations

import ast

import pytest
import torch

from fuseline.codegen.offline import TARGETS, compile_kernel
from tests.codegen.programs import PIPELINES, demo_geometry, lowered

pytest.importorskip("triton")
pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_kernel_of_the_demo_compiles_for_every_target(pipeline, dtype):
    result = lowered(demo_geometry(dtype=dtype), pipeline)
    assert not result.refusals
    for kernel in result.kernels:
        for target in TARGETS:
            compiled = compile_kernel(kernel, target)
            assert compiled.shared_bytes <= 99 * 1024, f"{kernel.name} needs {compiled.shared_bytes} bytes on {target}"


def test_a_lowered_program_is_readable_python_with_its_manifest():
    result = lowered(demo_geometry(vocabulary=64), "raise,fuse")
    tree = ast.parse(result.source)
    functions = {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}
    assert "call" in functions and {k.name for k in result.kernels} <= functions
    assert "Made by Fuseline from: modeling_llama.py" in ast.get_docstring(tree)
    manifest = result.manifest()
    assert manifest["version"] == 1 and manifest["eager"] == []
    for kernel in manifest["kernels"]:
        assert kernel["ops"] and kernel["regions"] and kernel["made_by"]
        assert all(":" in line for line in kernel["lines"])
    swiglu = [k for k in manifest["kernels"] if any("fuseline.glu" in op for op in k["ops"])]
    assert swiglu and any("fuseline.rms_norm" in op for op in swiglu[0]["ops"])


def test_the_layers_of_a_model_share_their_kernels():
    result = lowered(demo_geometry(vocabulary=64), "raise,fuse")
    linears = [x for x in result.launchers if "linear" in x.name]
    assert len(linears) == 2 * 4 + 1
    assert len({k.name for x in linears for k in x.kernels}) == 2 * (4 + 1)
