"""Caches of codes on a GPU: attention against the formula in float64, writes against the naive twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.cached import emit_cached
from tests.codegen.cached_cases import CASES, NAMES, Cached, writes
from tests.codegen.regions import BOUNDS, error, loaded

pytestmark = pytest.mark.gpu

LAYER: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head": 128, "head_v": 128, "block": 128}
LAYERS = [
    Cached("step of 8B", "int4:channel:g64", "int4:token:g64", length=3000, capacity=4096, mask="causal", **LAYER),
    Cached("batch of 8", "int4:channel:g32", "int4:token:g32", batch=8, length=700, capacity=1024, **LAYER),
    Cached("long", "int4:channel", "int4:token", length=32768, capacity=32768, **LAYER),
    Cached("minikv of 8B", "int2:channel:g16", "int2:token:g16", length=3000, capacity=4096, **LAYER),
    Cached("fp8 of 8B", "fp8:token", "fp8:token", length=3000, capacity=4096, **LAYER),
    Cached("int8 of 8B", "int8:channel:g64", "int8:token", length=3000, capacity=4096, **LAYER),
    Cached("step of 135M", "int4:channel:g64", "int4:token", heads=9, kv_heads=3, mask="causal"),
]


IN_EVERY_TYPE = {"kivi", "minikv", "int8", "fp8", "tada", "step of 8B"}
RUNS = [(case, torch.bfloat16) for case in [*CASES, *LAYERS]]
RUNS += [(c, dtype) for c, _ in RUNS if c.name in IN_EVERY_TYPE for dtype in (torch.float16, torch.float32)]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=lambda x: str(x).removeprefix("torch."))
def test_attention(case: Cached, dtype: torch.dtype, tmp_path: Path) -> None:
    launcher = emit_cached(case.graph(dtype), "attend")
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, tmp_path)
    for _ in range(2):
        inputs = case.inputs(dtype, "cuda")
        result = case.call(call, inputs)
        assert result.dtype == dtype
        assert error(result, case.exact(inputs)) < 2 * BOUNDS[dtype]  # codes become numbers in two roundings
        assert torch.equal(case.call(call, inputs), result)  # no atomics: the same bits at every run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("values", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize(
    "scheme", ["int4:channel:g32", "int4:token:g64", "int2:token:g16", "int8:token:sym", "fp8:token:g32"]
)
def test_writes(scheme: str, values: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    if values and "channel" in scheme:
        pytest.skip("values take a scale a token")
    case = Cached("write", scheme, scheme, batch=2, kv_heads=4, head=128, head_v=128, capacity=1024, block=128)
    launcher = emit_cached(writes(case, values, dtype), "write")
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, tmp_path)
    ours, naive = (case.side(values, dtype, "cuda") for _ in range(2))
    length = torch.zeros(1, dtype=torch.int64, device="cuda")
    for added in (3, 400, *[1] * 140, 5, 300, 1):
        x = torch.randn(2, added, 4, 128, device="cuda").to(dtype).transpose(1, 2)
        x[..., 3], x[:, :, ::7] = 0.5, 0.25
        given = [getattr(ours, name) for name in NAMES]
        call(*(g for g in given if g is not None), x, length)
        naive.write(x, length)
        length += added
        assert torch.equal(ours.recent, naive.recent)
        assert torch.equal(ours.read(length), naive.read(length))


def test_a_model_with_a_cache_of_codes() -> None:
    """Prompt and steps through the front door, with CUDA graphs: what the expanded cache gives in eager."""
    import fuseline
    from fuseline.models import load
    from fuseline.quantized_cache import QuantizedCache

    model = load("demo:tiny-llama").model.to("cuda", torch.bfloat16)
    ids = torch.randint(256, (2, 300), device="cuda")

    def logits(run: Any) -> torch.Tensor:
        cache = QuantizedCache(model.config, 512, "int4:channel:g32", "int4:token", window=16, block=64)
        head = model.config.hidden_size // model.config.num_attention_heads
        cache.early_initialization(2, model.config.num_key_value_heads, head, torch.bfloat16, "cuda")
        with torch.no_grad():
            found = [run(ids[:, :120], past_key_values=cache).logits[:, -1]]
            found += [run(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(120, 300)]
        return torch.stack(found)

    eager = logits(model)
    optimized = fuseline.optimize(model, "raise,fuse")
    assert error(logits(optimized), eager) < 5e-2
    assert any("attend" in k or "cached" in k for r in fuseline.reports(optimized) for k in map(str, r.kernels))
