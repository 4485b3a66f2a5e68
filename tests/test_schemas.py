"""What Fuseline writes has a published form, and what it wrote once is read by every later release.

`tests/formats/written-N` holds files as the release wrote them whose forms had that number: they are never written
again. A new number keeps the old folder and its tests, or the release says that it reads the old form no more.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fuseline
from fuseline import schemas
from fuseline.artifact import manifest as artifacts
from fuseline.codegen import manifest as manifests
from fuseline.compiler import plan as plans
from fuseline.compiler.observe import record as records
from fuseline.compiler.stage import load_stage
from tests.helpers.models import error

FORMATS = Path(__file__).parent / "formats"
WRITTEN = sorted(FORMATS.glob("written-*"))
FORMS = {
    "artifact": artifacts.VERSION,
    "manifest": manifests.VERSION,
    "plan": plans.VERSION,
    "record": records.VERSION,
}


def script() -> ModuleType:
    spec = spec_from_file_location("fuseline_formats_write", FORMATS / "write.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITE = script()


def files(folder: Path) -> dict[str, Path]:
    """The file of each form that `write.py` makes."""
    (manifest,) = (folder / "module").glob("*.json")
    return {
        "artifact": folder / "artifact" / "fuseline.json",
        "manifest": manifest,
        "plan": folder / "plan.json",
        "record": folder / "stages" / "record.json",
    }


def valid(name: str, data: object) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="schemas are checked by jsonschema: pip install jsonschema")
    schema = schemas.load(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(data, schema, jsonschema.Draft202012Validator)


def test_each_form_has_a_schema_of_its_number() -> None:
    assert {f"{form}-{number}" for form, number in FORMS.items()} <= set(schemas.names())
    for name in schemas.names():
        schema = schemas.load(name)
        assert schema["$id"] == f"urn:fuseline:{name}"
        assert schema["properties"]["version"]["const"] == int(name.rpartition("-")[2])


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda p: p.name)
def test_old_files_have_the_published_form(folder: Path) -> None:
    for form, path in files(folder).items():
        data = json.loads(path.read_text(encoding="utf-8"))
        valid(f"{form}-{data['version']}", data)


def test_what_is_written_today_has_the_published_form(tmp_path: Path) -> None:
    torch.compiler.reset()
    WRITE.write(tmp_path)
    for form, path in files(tmp_path).items():
        valid(f"{form}-{FORMS[form]}", json.loads(path.read_text(encoding="utf-8")))
    newest = WRITTEN[-1]
    names = [re.sub(r"[0-9a-f]{12,}", "DIGEST", str(p.relative_to(newest))) for p in newest.rglob("*")]
    assert sorted(names) == sorted(
        re.sub(r"[0-9a-f]{12,}", "DIGEST", str(p.relative_to(tmp_path)))
        for p in tmp_path.rglob("*")
        if "__pycache__" not in p.parts
    ), "another form is written: keep a folder of it, python tests/formats/write.py tests/formats/written-N"


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda p: p.name)
def test_old_artifacts_load(folder: Path) -> None:
    torch.compiler.reset()
    x, net = WRITE.inputs(), WRITE.Net().eval()
    model = fuseline.load(folder / "artifact", WRITE.Net, target="eager")
    with torch.no_grad():
        assert 1e-5 < error(model(x), net(x)) < 2e-2


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore:the plan's decisions:UserWarning")  # the pass's code goes on
def test_old_plans_are_followed(folder: Path) -> None:
    torch.compiler.reset()
    x, net = WRITE.inputs(), WRITE.Net().eval()
    plan = fuseline.Plan.load(folder / "plan.json")
    model = fuseline.optimize(WRITE.Net().eval(), WRITE.GPTQ, plan=plan, target="eager")
    with torch.no_grad():
        assert 1e-4 < error(model(x), net(x)) < 0.2
    assert set(plan.sites) == {"up/linear#0", "down/linear#0"}


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda p: p.name)
def test_old_stages_and_records_are_read(folder: Path) -> None:
    x, net = WRITE.inputs(), WRITE.Net().eval()
    for path in sorted((folder / "stages").glob("*.py")):
        program = load_stage(path)
        (result,) = program.run(program.examples)
        assert error(result, net(x)) < 1e-5, path.name
    data = records.read_record(folder / "stages")
    assert [s["name"] for s in data["stages"]] == ["captured", "raise", "fuse"]


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda p: p.name)
def test_old_modules_have_their_manifests(folder: Path) -> None:
    (module,) = (folder / "module").glob("*.py")
    assert [kernel["name"] for kernel in manifests.manifest_of(module)["kernels"]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(version=2), "is a plan of version 2, and this release reads version 1"),
        (lambda d: d.pop("sites"), "is a damaged plan: KeyError: 'sites'"),
        (lambda d: d["sites"]["up/linear#0"]["quantize"]["tensors"].update(codes="x"), "is a damaged plan: KeyError"),
    ],
)
def test_a_plan_that_cannot_be_read_says_so(tmp_path: Path, damage, message: str) -> None:
    for path in WRITTEN[-1].glob("plan.*"):
        shutil.copy(path, tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    damage(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(fuseline.UserError, match=re.escape(message)):
        fuseline.Plan.load(tmp_path / "plan.json")
