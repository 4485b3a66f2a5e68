"""The manifest: it validates against the published schema, and maps every kernel to ops, passes, lines and buffers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import fuseline
from fuseline import schemas
from fuseline.codegen.kernel import Launcher
from fuseline.codegen.lower import Lowered, lower
from fuseline.codegen.manifest import describe, manifest_of
from fuseline.codegen.module_file import load_module
from fuseline.compiler.errors import UserError

SCHEMA = schemas.load("manifest-1")
ROOT = Path(fuseline.__file__).parent.parent


class Block(torch.nn.Module):
    """Two equal halves, so that regions share kernels."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.up = torch.nn.ModuleList(torch.nn.Linear(width, 2 * width) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(2 * width, width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down):
            x = x + down(torch.relu(up(x)))
        return x


def lowered(pipeline: str = "fuse", dynamic: bool = True) -> Lowered:
    shapes = {"x": {0: torch.export.Dim.AUTO}} if dynamic else None
    program = fuseline.capture(Block().eval(), (torch.randn(5, 32),), {}, shapes)
    return lower(fuseline.Pipeline(pipeline).run(program)[0])


def fields(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property anywhere in a schema."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {}).items()
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from fields(part)


def check(manifest: dict[str, Any]) -> None:
    """Valid, and complete: each kernel has ops, and lines that exist in files that exist."""
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    regions = {region["name"]: region for region in manifest["regions"]}
    assert manifest["kernels"]
    for kernel in manifest["kernels"]:
        assert kernel["ops"] and kernel["lines"] and kernel["made_by"], kernel["name"]
        pointers = {a for a, kind in kernel["signature"].items() if kind.startswith("*")}
        assert {b["argument"] for b in kernel["buffers"]} == pointers, "every pointer is a buffer"
        assert {b["access"] for b in kernel["buffers"]} == {"read", "write"}
        for line in kernel["lines"]:
            name, _, number = line.rpartition(":")
            (path,) = manifest["files"][name]
            assert 1 <= int(number) <= len(Path(path).read_text().splitlines())
        for place in kernel["regions"]:
            region = regions[place]
            values = {v["name"] for v in (*region["inputs"], *region["outputs"])}
            scratch = {b["value"] for b in kernel["buffers"] if b["scratch"]}
            assert set(region["buffers"][kernel["name"]]) == pointers
            assert set(region["buffers"][kernel["name"]].values()) <= values | scratch
            assert set(kernel["ops"]) <= {node["op"] for node in region["nodes"]}
            assert kernel["name"] in region["kernels"]
            for node in (n for n in region["nodes"] if n["op"] in kernel["ops"]):
                assert set(node["lines"]) <= set(kernel["lines"]) and set(node["made_by"]) <= set(kernel["made_by"])
    for name, region in regions.items():
        served = {op for kernel in manifest["kernels"] if name in kernel["regions"] for op in kernel["ops"]}
        assert not region["kernels"] or served == {node["op"] for node in region["nodes"]}


def test_the_schema_is_a_schema_and_describes_its_fields() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert not [field for field, part in fields(SCHEMA) if "description" not in part and "$ref" not in part]
    assert len(list(fields(SCHEMA))) > 60


def test_a_manifest_is_valid_and_complete() -> None:
    result = lowered()
    manifest = result.manifest()
    check(manifest)
    assert [k["name"] for k in manifest["kernels"]] == [k.name for k in result.kernels]
    assert manifest == json.loads(json.dumps(manifest)), "it is plain JSON data"


def test_kernels_know_their_places_and_their_buffers() -> None:
    manifest = lowered().manifest()
    up = next(k for k in manifest["kernels"] if k["ops"] == ["aten.linear.default", "aten.relu.default"])
    places = [r for r in manifest["regions"] if r["name"] in up["regions"]]
    assert [r["module"] for r in places] == ["", ""] and len(places) == 2, "relu is the model's own, linear a child's"
    assert [[n["module"] for n in r["nodes"]] for r in places] == [["up.0", ""], ["up.1", ""]]
    reads = {b["argument"]: b for b in up["buffers"] if b["access"] == "read"}
    (written,) = (b for b in up["buffers"] if b["access"] == "write")
    assert reads["x_ptr"]["shape"] == [next(iter(manifest["symbols"])), 32]
    assert reads["weight_ptr"]["shape"] == [64, 32] and written["dtype"] == "float32"
    assert manifest["symbols"] == {reads["x_ptr"]["shape"][0]: {"input": "x", "dimension": 0}}
    names = []
    for place in places:  # which parameter each of them reads, through the region's input
        value = place["buffers"][up["name"]]["weight_ptr"]
        (weight,) = (v["weight"] for v in place["inputs"] if v["name"] == value)
        names.append(manifest["weights"][weight]["name"])
    assert names == ["up.0.weight", "up.1.weight"]


def test_what_runs_through_pytorch_says_why() -> None:
    class Sorted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sort(x).values * 2 + x.cumsum(0)

    program = fuseline.capture(Sorted(), (torch.randn(4, 8),))
    manifest = lower(fuseline.Pipeline("fuse").run(program)[0]).manifest()
    check(manifest)
    assert {"op": "aten.sort.default", "count": 1} in manifest["outside"]


def test_it_does_not_depend_on_the_compilation() -> None:
    first, second = lowered(), lowered()
    assert first.manifest() == second.manifest() and first.source == second.source


def test_it_is_found_again_from_a_loaded_module(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    result = lowered()
    path = result.write(tmp_path)
    assert manifest_of(load_module(path)) == manifest_of(path) == result.manifest()
    path.write_text(path.read_text() + "\n# mine\n")
    with pytest.raises(UserError, match=f"{path.name} was edited after its manifest was written"):
        manifest_of(path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        manifest_of(path)
    path.with_suffix(".json").write_text('{"version": 7}')
    with pytest.raises(UserError, match="is no manifest of version 1"):
        manifest_of(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="no manifest at"):
        manifest_of(path)
    path.unlink()
    with pytest.raises(UserError, match="no emitted module at"):
        manifest_of(path)


def test_a_wrong_manifest_does_not_validate() -> None:
    """The schema is no empty form: what a fault would leave out or misname is found."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for spoil in (
        lambda m: m["kernels"][0].pop("lines"),
        lambda m: m["kernels"][0].update(ops=[]),
        lambda m: m["kernels"][0]["buffers"][0].update(access="look"),
        lambda m: m["kernels"][0]["lines"].append("modeling.py"),
        lambda m: m["regions"][0]["inputs"][0].pop("shape"),
        lambda m: m.update(version=2),
        lambda m: m.update(extra=1),
    ):
        manifest = lowered().manifest()
        spoil(manifest)
        assert not validator.is_valid(manifest)


def test_a_kernel_without_its_region_is_a_fault() -> None:
    """`describe` reads the launchers: one that is lost cannot go by unseen."""
    result = lowered()
    lost = [Launcher(x.name, x.source) for x in result.launchers]
    with pytest.raises(IndexError):
        describe(type(result)(**{**vars(result), "launchers": tuple(lost)}))


@pytest.mark.slow
def test_an_installed_wheel_has_the_schema(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    copy = tmp_path / "source"
    shutil.copytree(ROOT / "fuseline", copy / "fuseline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    subprocess.run(build, cwd=copy, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--target", installed, wheel], check=True)
    code = "import fuseline, fuseline.schemas as s; print(fuseline.__file__); print(s.load('manifest-1')['$id'])"
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r}); {code}"],
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    where, found = done.stdout.splitlines()
    assert where.startswith(str(installed)) and found == SCHEMA["$id"]
