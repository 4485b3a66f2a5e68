"""Every kernel of the demo's programs against its naive twin: each region in the interpreter and in eager float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Interpreter

from fuseline.codegen.lower import Lowered, function_name
from fuseline.codegen.module_file import load_module
from fuseline.compiler.compat import size_hint
from tests.codegen.programs import PIPELINES, demo_geometry, lowered
from tests.codegen.regions import Poisoned

pytest.importorskip("transformers")


class Wide(Interpreter):
    """A region with every floating-point type it names widened to float64."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        widened = torch.utils._pytree.tree_map(
            lambda a: torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a, (args, kwargs)
        )
        return super().call_function(target, *widened)


def inputs_of(region: GraphModule, rows: int) -> list[Any]:
    """Random inputs in the shapes, types and strides of a region's placeholders; symbolic sizes become `rows`."""
    made = []
    for node in (n for n in region.graph.nodes if n.op == "placeholder"):
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            made.append(rows)
            continue
        sizes = [s if isinstance(s, int) else rows for s in value.shape]
        order = sorted(range(value.dim()), key=lambda d: size_hint(value.stride(d)), reverse=True)
        shape = [sizes[d] for d in order]
        if value.dtype == torch.bool:
            tensor = torch.rand(shape) > 0.5
        elif value.dtype.is_floating_point:
            tensor = torch.randn(shape).to(value.dtype)
            tensor = tensor.abs() * 0.01 if "scale" in node.name else tensor
        else:
            info = torch.iinfo(value.dtype)
            low, high = (0, 15) if "zero" in node.name else (max(info.min, -128), min(info.max, 255))
            tensor = torch.randint(low, high + 1, shape).to(value.dtype)
        made.append(tensor.permute([order.index(d) for d in range(value.dim())]))
    return made


def check_regions(result: Lowered, folder, rows: tuple[int, ...]) -> int:
    module = load_module(result.write(folder))
    module.torch = Poisoned()
    seen: set[tuple[str, ...]] = set()
    checked = 0
    for launcher in result.launchers:
        kernels = tuple(k.name for k in launcher.kernels)
        if kernels in seen:
            continue
        seen.add(kernels)
        region = next(r for name, r in result.regions.items() if function_name(name) == launcher.name)
        for count in rows:
            inputs = inputs_of(region, count)
            ours = getattr(module, launcher.name)(*inputs)
            wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
            exact = Wide(region).run(*wide)
            for actual, reference in zip(_flat(ours), _flat(exact), strict=True):
                scale = reference.double().abs().max().clamp_min(1e-30)
                error = (actual.double() - reference.double()).abs().max() / scale
                bound = 1 if reference.dtype == torch.int8 else 3e-5 * scale
                assert error * scale <= bound, f"{launcher.name} at {count} rows: {error:.2e}"
            checked += 1
    return checked


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_region_of_the_demo_matches_its_naive_twin(pipeline, tmp_path):
    result = lowered(demo_geometry(vocabulary=320), pipeline)
    assert not result.refusals
    assert check_regions(result, tmp_path, rows=(1, 5)) >= 10


def test_a_small_program_matches_in_the_interpreter(tmp_path):
    from tests.helpers.models import tiny_llama

    result = lowered(tiny_llama(), "raise,quantize{weights=int4:g32},fuse")
    assert check_regions(result, tmp_path, rows=(1, 5)) >= 8
