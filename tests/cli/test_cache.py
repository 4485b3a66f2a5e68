"""`fuseline cache`, and a second `fuseline kernels` that compiles nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fuseline.codegen.kernel import Kernel
from fuseline.codegen.offline import compile_kernel
from fuseline.runtime import kernel_store
from fuseline.runtime.cache import Cache
from fuseline.runtime.kernel_store import KernelStore
from fuseline.runtime.tensor_store import TensorStore

COPY = Kernel(
    "copy",
    """@triton.jit
def copy(x_ptr, y_ptr, B: tl.constexpr):
    k = tl.arange(0, B)
    tl.store(y_ptr + k, tl.load(x_ptr + k))
""",
    {"x_ptr": "*fp32", "y_ptr": "*fp32", "B": "constexpr"},
    {"B": 32},
)
MLP = """
import torch

def make():
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU()), (torch.ones(3, 16),)
"""


def data_of(result) -> dict:
    assert result.code == 0, result.err
    assert max(map(len, result.err.splitlines() or [""])) <= 80
    return json.loads(result.out)


def test_a_second_kernels_compiles_nothing(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cached_mlp.py").write_text(MLP)
    command = ("kernels", "py:cached_mlp:make", "-p", "fuse", "--json", "-")
    first = cli(*command)
    kernels = json.loads(first.out)["kernels"]
    count = sum(len(k["targets"]) for k in kernels)
    assert count >= 6 and all(k["cached"] == [] for k in kernels)
    assert f"{count} compiled, 0 were in the cache" in first.err

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(triton, "compile", never)
    second = cli(*command)
    again = json.loads(second.out)["kernels"]
    assert all(k["cached"] == list(k["targets"]) and set(k["targets"].values()) == {"ok"} for k in again)
    assert "nothing was compiled: all of it was in the cache" in second.err
    assert [k["targets"] for k in again] == [k["targets"] for k in kernels]


def test_the_state_of_the_cache(cli: Callable, tmp_path: Path) -> None:
    empty = data_of(cli("cache", "--json", "-"))
    assert empty["kinds"] == {kind: {"entries": 0, "bytes": 0} for kind in ("kernels", "modules", "decompositions")}
    assert empty["path"] == str(tmp_path / "cache") and empty["limit"] == 1 << 30
    compile_kernel(COPY, "sm_90", KernelStore())
    modules = tmp_path / "cache" / "modules"
    modules.mkdir()
    (modules / "fuseline_1.py").write_text("x = 1\n")
    (modules / "fuseline_1.json").write_text("{}")
    (tmp_path / "cache" / "smollm2").mkdir()
    TensorStore().put("down", {"weight": "abc"}, {"up": torch.ones(8, 3)})
    full = cli("cache", "--json", "-")
    data = data_of(full)
    assert data["kinds"]["kernels"]["entries"] == 1 and data["kinds"]["kernels"]["bytes"] > 1000
    assert data["kinds"]["modules"] == {"entries": 1, "bytes": 8} and data["damaged"] == []
    assert data["kinds"]["decompositions"]["entries"] == 1 and data["kinds"]["decompositions"]["bytes"] > 96
    assert "next: fuseline cache --why copy" in full.err
    (entry,) = Cache().entries()
    os.truncate(entry.path / "copy.cubin", 10)
    damaged = cli("cache", "--json", "-")
    (item,) = data_of(damaged)["damaged"]
    assert item["path"] == str(entry.path) and "copy.cubin has 10 bytes" in item["reason"]
    assert "damaged, and replaced when it is needed" in damaged.err
    cleared = data_of(cli("cache", "--clear", "--json", "-"))
    assert cleared["removed"] == {"entries": 1, "modules": 1, "decompositions": 1}
    assert data_of(cli("cache", "--json", "-"))["kinds"] == empty["kinds"]
    assert (tmp_path / "cache" / "smollm2").is_dir(), "a fetched model is not compiled code"


def test_why_a_kernel_was_compiled(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel(COPY, "sm_90", KernelStore())
    here = dict(kernel_store.versions())
    with monkeypatch.context() as patch:
        patch.setattr(kernel_store, "versions", lambda: {**here, "triton": "99.0", "torch": "98.0"})
        compile_kernel(COPY, "sm_90", KernelStore())
    result = cli("cache", "--why", "copy", "--json", "-")
    first, second = data_of(result)["entries"]
    assert first["because"] == "no entry of copy" and first["other_versions"] == {} and first["target"] == "cuda:90"
    assert set(second["because"].split("; ")) == {
        f"triton: {here['triton']} stored, 99.0 here",
        f"torch: {here['torch']} stored, 98.0 here",
    }
    assert second["other_versions"]["torch"] == {"stored": "98.0", "here": here["torch"]}
    assert "not used here: triton 99.0 stored" in result.err


def test_mistakes(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel(COPY, "sm_90", KernelStore())
    result = cli("cache", "--why", "copi")
    assert result.code == 2 and "the cache has no kernel 'copi'; did you mean 'copy'?" in result.err
    result = cli("cache", "--why", "copy", "--clear")
    assert result.code == 2 and "--clear and --why cannot be given together" in result.err
    monkeypatch.setenv("FUSELINE_CACHE_SIZE", "big")
    result = cli("cache")
    assert result.code == 2 and "FUSELINE_CACHE_SIZE is 'big'" in result.err


def test_a_cache_that_cannot_be_written(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuseline.runtime import location

    monkeypatch.setattr(location, "_warned", set())
    monkeypatch.setenv("FUSELINE_CACHE", "/proc/fuseline")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "uncached_mlp.py").write_text(MLP)
    with pytest.warns(location.CacheWarning) as caught:
        result = cli("kernels", "py:uncached_mlp:make", "-p", "fuse", "--json", "-")
    assert result.code == 0 and len([w for w in caught if w.category is location.CacheWarning]) == 1
    assert all(set(k["targets"].values()) == {"ok"} for k in json.loads(result.out)["kernels"])
    assert json.loads(cli("cache", "--json", "-").out)["kinds"]["kernels"]["entries"] == 0
    assert cli("cache", "--clear").code == 0


def test_path_size_and_clear(cli: Callable, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    assert cli("cache", "path").out == f"{root}\n"
    compile_kernel(COPY, "sm_90", KernelStore())
    (root / "smollm2").mkdir()
    (root / "smollm2" / "model.safetensors").write_bytes(b"x" * 1000)
    (root / "model.gguf").write_bytes(b"x" * 234)
    sizes = data_of(cli("cache", "size", "--json", "-"))
    (entry,) = Cache().entries()
    stored = sum(path.stat().st_size for path in entry.path.iterdir())
    assert sizes["bytes"]["fetched models"] == 1234 and sizes["bytes"]["kernels"] == stored > 1000
    assert sizes["total"] == sum(sizes["bytes"].values())
    assert data_of(cli("cache", "clear", "--json", "-"))["removed"] == {"entries": 1, "modules": 0, "decompositions": 0}
    assert data_of(cli("cache", "size", "--json", "-"))["total"] == 1234
    assert data_of(cli("cache", "clear", "--models", "--json", "-"))["removed"]["models"] == 2
    assert data_of(cli("cache", "size", "--json", "-"))["total"] == 0


def test_mistakes_with_actions(cli: Callable) -> None:
    result = cli("cache", "clea")
    assert result.code == 2 and "unknown action 'clea'; did you mean 'clear'?" in result.err
    result = cli("cache", "--models")
    assert result.code == 2 and "--models goes with clear" in result.err
