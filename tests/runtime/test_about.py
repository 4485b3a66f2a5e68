"""What is compiled at run time is kept with its ops, lines and makers, from the manifest beside its module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import fuseline
from fuseline.codegen.lower import lower
from fuseline.codegen.module_file import load_module
from fuseline.runtime.about import about
from fuseline.runtime.cache import Cache
from fuseline.runtime.entry import Entry
from fuseline.runtime.kernel_store import KernelStore
from fuseline.runtime.kernels import wrap
from tests.runtime.fake_gpu import fake_gpu
from tests.runtime.launches import module


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + 1)


def test_a_kernel_that_was_compiled_at_run_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fuseline.capture(Twice(), (torch.zeros(4, 64),))
    lowered = lower(fuseline.Pipeline("fuse").run(program)[0])
    (described,) = lowered.manifest()["kernels"]
    expected = {key: described[key] for key in ("ops", "lines", "made_by", "regions")}
    cache = Cache(tmp_path / "cache")
    with fake_gpu(monkeypatch):
        wrap(load_module(lowered.write(tmp_path)), KernelStore(cache)).call(torch.zeros(4, 64))
    (entry,) = cache.entries()
    assert isinstance(entry, Entry) and entry.about == expected
    assert expected["ops"] == ["aten.add.Tensor", "aten.relu.default"] and expected["regions"] == ["pointwise_0"]
    store = KernelStore(cache)
    with fake_gpu(monkeypatch):
        wrap(load_module(lowered.write(tmp_path / "again")), store).call(torch.zeros(4, 64))
    assert store.hits == 1 and not store.misses, "what a kernel is for is no part of its key"
    (again,) = cache.entries()
    assert again.about == expected


def test_no_manifest_is_no_failure(tmp_path: Path) -> None:
    loaded = module(tmp_path)
    assert about(loaded.add) == {} and about(None) == {}
    for text in ("{", "[]", '{"kernels": []}', '{"kernels": [{"name": "add"}]}'):
        (tmp_path / "kernels.json").write_text(text)
        assert about(loaded.add) == {}


def test_entries_without_a_description_are_read(tmp_path: Path) -> None:
    """Earlier releases wrote none."""
    cache = Cache(tmp_path)
    path = cache.put("kernels", "k", {"a": 1}, {"f": b"x"}, about={"ops": ["o"]})
    assert path is not None and cache.get("kernels", "k", {"a": 1}).about == {"ops": ["o"]}
    header = json.loads((path / "entry.json").read_text())
    del header["about"]
    (path / "entry.json").write_text(json.dumps(header))
    assert cache.get("kernels", "k", {"a": 1}).about == {}
