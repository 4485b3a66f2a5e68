"""`fuseline kernels`: resources, filters, code of every kind, and the manifest on a cold and on a warm cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

pytest.importorskip("triton")

from fuseline import schemas
from fuseline.codegen.manifest import manifest_of
from fuseline.codegen.module_file import load_module
from fuseline.models.fetch import smollm2_gguf
from fuseline.runtime.cache import Cache
from fuseline.runtime.location import cache_root
from tests.codegen.test_manifest import check

MLP = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(32, 32)

    def forward(self, x):
        return torch.sin(torch.relu(self.fc(x))).sum(-1)

def make():
    return Net().eval(), (torch.ones(3, 32),)
"""


@pytest.fixture
def mlp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "kernels_mlp.py").write_text(MLP)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "py:kernels_mlp:make"


def data_of(result: Any) -> dict[str, Any]:
    assert result.code == 0, result.err
    assert max(map(len, result.err.splitlines()[:-1] or [""])) <= 80, result.err
    return json.loads(result.out)


def test_each_kernel_has_its_resources_on_each_target(cli: Callable, mlp: str) -> None:
    result = cli("kernels", mlp, "-p", "fuse", "--resources", "--json", "-")
    data = data_of(result)
    check(data["manifest"])
    assert [k["name"] for k in data["kernels"]] == [k["name"] for k in data["manifest"]["kernels"]]
    rows = [line.split() for line in result.err.splitlines() if re.match(r"(sm_\d\d|gfx942) ", line)]
    shown = iter(rows)
    for kernel in data["manifest"]["kernels"]:
        assert list(kernel["targets"]) == ["sm_80", "sm_90", "gfx942"]
        for number, (target, found) in enumerate(kernel["targets"].items()):
            keys = ("registers", "spill_bytes", "shared_bytes", "num_warps", "num_stages", "code_bytes")
            name = [kernel["name"]] if number == 0 else []
            assert next(shown) == [target, *(str(found[key]) for key in keys), *name]
            assert found["registers"] > 0 and found["code_bytes"] > 0 and found["unknown"] == {}
            assert found["num_warps"] == kernel["num_warps"]
    sine = next(k for k in data["manifest"]["kernels"] if "aten.sin.default" in k["ops"])
    assert sine["targets"]["sm_90"]["local_bytes"] > 0 == sine["targets"]["sm_90"]["spill_bytes"]
    assert "no kernel spills registers" in result.err


def test_the_short_form_names_the_highest_figures(cli: Callable, mlp: str) -> None:
    result = cli("kernels", mlp, "-p", "fuse", "--json", "-")
    kernels = data_of(result)["manifest"]["kernels"]
    highest = max((t["registers"], k["name"], name) for k in kernels for name, t in k["targets"].items())[0]
    assert f"at most {highest} registers (" in result.err and "regs" not in result.err
    assert result.err.rstrip().splitlines()[-2].startswith("next: ")


def test_a_glob_picks_kernels(cli: Callable, mlp: str) -> None:
    every = data_of(cli("kernels", mlp, "-p", "fuse", "--json", "-"))
    picked = data_of(cli("kernels", mlp, "-p", "fuse", "--kernel", "*_row", "--json", "-"))
    names = [k["name"] for k in every["kernels"] if k["name"].endswith("_row")]
    assert names and [k["name"] for k in picked["kernels"]] == names
    assert [k["name"] for k in picked["manifest"]["kernels"] if "targets" in k] == names
    check(picked["manifest"])
    wrong = cli("kernels", mlp, "-p", "fuse", "--kernel", "run_linear_0_rov")
    assert wrong.code == 2 and "no kernel is called 'run_linear_0_rov'; did you mean 'run_linear_0_row'?" in wrong.err


CODE = {
    ("ttir", None): r"tt\.func public @run_linear_0_row\(",
    ("ttgir", "sm_80"): r"cuda:80",
    ("ttgir", "gfx942"): r"hip:gfx942",
    ("llir", None): r"define .*@run_linear_0_row\(",
    ("ptx", None): r"\.target sm_90a",
    ("ptx", "sm_80"): r"\.target sm_80\n",
    ("sass", "sm_80"): r"Function:run_linear_0_row\n(?:.*\n)*.*\tEXIT",
    ("amdgcn", None): r"amdgcn-amd-amdhsa--gfx942",
}


def test_the_code_of_one_kernel(cli: Callable, mlp: str) -> None:
    for (kind, target), expected in CODE.items():
        where = ["--for", target] if target else []
        shown = cli("kernels", mlp, "-p", "fuse", "--show", "run_linear_0_row", "--asm", kind, *where)
        assert shown.code == 0, shown.err
        assert re.search(expected, shown.out), f"{kind} {target}: {shown.out[:400]}"
    data = json.loads(
        cli("kernels", mlp, "-p", "fuse", "--show", "run_linear_0_row", "--asm", "ptx", "--json", "-").out
    )
    assert (data["kernel"], data["kind"], data["target"]) == ("run_linear_0_row", "ptx", "sm_90")
    assert ".entry run_linear_0_row(" in data["text"]
    source = json.loads(cli("kernels", mlp, "-p", "fuse", "--show", "run_linear_0_row", "--json", "-").out)
    assert source["kind"] == "source" and "def run_linear_0_row(" in source["text"]


def test_mistakes_about_code(cli: Callable, mlp: str) -> None:
    command = ("kernels", mlp, "-p", "fuse")
    for options, message in (
        (("--asm", "ptx"), "--asm and --for print one kernel's code"),
        (("--show", "run_linear_0_row", "--asm", "ptxx"), "no kind of code 'ptxx'; did you mean 'ptx'?"),
        (("--show", "run_linear_0_row", "--asm", "ptx", "--for", "gfx942"), "gfx942 has no ptx\n  try: --for sm_90"),
        (("--show", "run_linear_0_row", "--asm", "amdgcn", "--for", "sm_90"), "sm_90 has no amdgcn"),
        (("--show", "run_linear_0_row", "--asm", "ptx", "--for", "sm_9"), "unknown target 'sm_9'"),
        (("--show", "run_linear_0_row", "--for", "sm_90"), "the source is the same for every GPU"),
    ):
        result = cli(*command, *options)
        assert result.code == 2 and message in result.err, result.err


def test_the_schema_is_printed_without_a_model(cli: Callable) -> None:
    result = cli("kernels", "--schema")
    assert result.code == 0 and json.loads(result.out) == schemas.load("manifest-1")
    with pytest.raises(Exception, match="no schema 'manifest'; did you mean 'manifest-1'"):
        schemas.load("manifest")


def test_a_binary_in_the_cache_knows_what_it_is_for(cli: Callable, mlp: str) -> None:
    data = data_of(cli("kernels", mlp, "-p", "fuse", "--json", "-"))
    kernels = {k["name"]: k for k in data["kernels"]}
    entries = list(Cache().entries())
    assert {e.name for e in entries} == set(kernels)
    assert len(entries) == 4 * len(kernels), "one a target, and for Hopper one that begins early"
    for entry in entries:
        kernel = kernels[entry.name]
        assert entry.about == {key: kernel[key] for key in ("ops", "lines", "made_by")}
    why = cli("cache", "--why", "run_linear_0_row", "--json", "-")
    assert data_of(why)["entries"][0]["about"]["lines"] == kernels["run_linear_0_row"]["lines"]
    assert "computes: linear" in why.err and "made by: fuse/" in why.err


def in_a_fresh_process(cache: Path, out: Path, model: str, pipeline: str) -> dict[str, Any]:
    """What `fuseline kernels` says and writes in a process of its own."""
    command = [sys.executable, "-m", "fuseline", "kernels", model, "-p", pipeline, "-o", str(out), "--json", "-"]
    environment = {**os.environ, "FUSELINE_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def share_the_weights(cache: Path) -> None:
    """Links the fetched model into a cache that holds no compiled code."""
    smollm2_gguf()
    cache.mkdir()
    for item in cache_root().iterdir():
        if item.name not in ("compiled", "modules"):
            (cache / item.name).symlink_to(item)


def every_kernel_is_mapped(tmp_path: Path, model: str, pipeline: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """On a cold and a warm cache: the verb's and the module's manifests are valid and map 100% of the kernels."""
    cold, warm = (in_a_fresh_process(tmp_path / "cache", tmp_path / "out", model, pipeline) for _ in range(2))
    validator = jsonschema.Draft202012Validator(schemas.load("manifest-1"))
    for said, was_cached in ((cold, False), (warm, True)):
        validator.validate(said["manifest"])
        check(said["manifest"])
        for kernel in said["manifest"]["kernels"]:
            assert all(t["ok"] and t["cached"] is was_cached for t in kernel["targets"].values())
            for target in kernel["targets"].values():
                target.pop("cached")
    assert warm["manifest"] == cold["manifest"], "a cache hit loses nothing"
    check(manifest_of(warm["path"]))
    module = load_module(warm["path"])
    names = [k["name"] for k in manifest_of(module)["kernels"]]
    assert names == [k["name"] for k in cold["kernels"]] and all(hasattr(module, name) for name in names)
    entries = list(Cache(tmp_path / "cache" / "compiled").entries())
    assert {e.name for e in entries} == set(names)
    assert all(e.about["ops"] and e.about["lines"] and e.about["made_by"] for e in entries)
    return cold, warm


@pytest.mark.slow
def test_every_kernel_is_mapped_on_a_cold_and_a_warm_cache(tmp_path: Path, mlp: str, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    cold, _ = every_kernel_is_mapped(tmp_path, mlp, "fuse")
    assert len(cold["kernels"]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, pipeline",
    [
        ("demo:tiny-decoder", "raise,fuse"),
        ("demo:tiny-llama", "raise,quantize{weights=int4:g64},fuse"),
        ("demo:smollm2", "raise,quantize{weights=int8},fuse"),
    ],
)
def test_every_kernel_of_a_demo_is_mapped_on_a_cold_and_a_warm_cache(tmp_path: Path, model: str, pipeline: str) -> None:
    if model == "demo:smollm2":
        share_the_weights(tmp_path / "cache")
    cold, _ = every_kernel_is_mapped(tmp_path, model, pipeline)
    if model == "demo:smollm2":
        regions = cold["manifest"]["regions"]
        assert sum(bool(region["kernels"]) for region in regions) >= 30 * 4, "thirty layers"
        assert any("modeling_llama.py:" in line for kernel in cold["kernels"] for line in kernel["lines"])
