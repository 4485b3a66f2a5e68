"""The benchmark of caches of codes: what it measures is what the cache does; its quality part in its small form."""

from __future__ import annotations

import json
from pathlib import Path

import kv
import pytest
import torch
from caching import rows
from caching.quality import Attention, Setting, seeing

from fuseline.models import load

pytest.importorskip("transformers")


@pytest.mark.parametrize("centred", [False, True])
@torch.no_grad()
def test_each_query_sees_what_it_would_find_in_the_cache(centred: bool) -> None:
    """All tokens at once, under the benchmark's attention, against a `QuantizedCache` that grows token by token."""
    from fuseline import QuantizedCache

    model = load("demo:tiny-llama").model
    held = {"window": 8, "block": 32, "centred": centred}
    setting = Setting.same(2, "int4:channel:g32", "int4:token", dtype=torch.float32, **held)
    ids = torch.randint(256, (1, 90), generator=torch.Generator().manual_seed(0))
    with seeing(model, Attention(setting)):
        at_once = model(ids, use_cache=False).logits
    cache = QuantizedCache(model.config, 96, setting.keys, setting.values, **held)
    steps = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(90)], 1)
    exact = model(ids, use_cache=False).logits
    assert (at_once - steps).abs().max() < 1e-5 < 1e-3 < (exact - steps).abs().max()


def test_a_tiny_model(tmp_path: Path) -> None:
    path = tmp_path / "kv.json"
    only = [f"demo:tiny-llama {name}" for name in ("bf16", "kivi4 g32", "kivi2 g32", "int8", "tada 0.9")]
    words = "--part quality --device cpu --models demo:tiny-llama --length 160 --windows 1 --trials 2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows.Model, "budgets", property(lambda self: (0.9,), lambda self, value: None), raising=False)
        kv.main([*words.split(), "--only", *only, "--json", str(path)])
    found = {row["name"].split(" ", 1)[1]: row for row in json.loads(path.read_text())["rows"]}
    assert all("failed" not in row for row in found.values()) and len(found) == 5
    assert found["bf16"]["ratio"] == 1 and found["kivi4 g32"]["ratio"] == 0.3125
    assert 0 == found["bf16"]["kl"] < found["int8"]["kl"] < found["kivi4 g32"]["kl"] < found["kivi2 g32"]["kl"]
    assert found["tada 0.9"]["ratio"] <= 0.9 and set(found["tada 0.9"]["bits"]) <= {2, 4, 8}


def test_what_the_speed_part_asks_for() -> None:
    """Each of its caches fits the shape that it is measured at."""
    from fuseline.compiler.cached import CacheScheme

    for keys, values, block in kv.CACHES.values():
        assert CacheScheme.parse(keys).refuse(128, block, False) is None
        assert CacheScheme.parse(values).refuse(128, block, True) is None
    assert set(kv.SWEPT) <= set(kv.CACHES)
    assert kv.parse(["--sweep"]).sweep
