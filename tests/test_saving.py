"""fuseline.save and fuseline.load: the same bits, only what is needed, whole or not at all, or a clear error."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fuseline
from fuseline import UserError
from fuseline.artifact import manifest as manifests, tensors
from fuseline.artifact.tensors import Kind
from fuseline.compiler.plan import Plan
from fuseline.originals import dropped
from tests.compiler.test_plan import BATCHES, Net, Threshold
from tests.helpers.models import Mlp, Tied, registered, tiny_llama

INT8 = "quantize{weights=int8}"
X = torch.arange(16.0).reshape(2, 8) / 8


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@torch.no_grad()
def optimized(model: torch.nn.Module | None = None, pipeline: str = INT8, x: torch.Tensor = X, **settings: Any):
    """A called model and its result."""
    torch.manual_seed(0)
    model = fuseline.optimize(model or Mlp(), pipeline, **settings)
    return model, model(x)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "fuseline.json").read_text())


def tensor_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """An artifact of an int8 Mlp, and its result for X. Tests that change it copy it."""
    model, result = optimized()
    return fuseline.save(model, tmp_path_factory.mktemp("artifacts") / "mlp"), result


# The same bits


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("pipeline", [INT8, "raise{allow_empty},quantize{weights=int4:g4},fuse{allow_empty}"])
def test_the_same_bits_after_loading(tmp_path: Path, pipeline: str, keep: bool) -> None:
    model, result = optimized(pipeline=pipeline, keep_originals=keep)
    loaded = fuseline.load(fuseline.save(model, tmp_path / "out"), model=Mlp)
    assert torch.equal(loaded(X), result)  # without torch.no_grad(): a loaded model is frozen
    assert sorted(dropped(loaded)) == ["down.weight", "gate.weight", "up.weight"]
    assert not loaded.training and loaded.up.weight.dtype == torch.float32


FRESH = """
import sys, torch, fuseline
model, (ids, logits, tokens) = fuseline.load(sys.argv[1]), torch.load(sys.argv[2])
assert torch.equal(model(ids).logits, logits)
assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)
fuseline.save(model, sys.argv[3])
print(type(model).__name__, model.config._attn_implementation, len(fuseline.reports(model)))
"""


@torch.no_grad()
@pytest.mark.slow
def test_a_fresh_process_computes_the_same_and_saves_the_same(tmp_path: Path) -> None:
    """generate() included, and the loaded model is saved again."""
    ids = torch.arange(8)[None]
    model = fuseline.optimize(tiny_llama(num_hidden_layers=1), "raise,quantize{weights=int8},fuse")
    torch.save((ids, model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)), tmp_path / "ref.pt")
    folder = fuseline.save(model, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, folder, tmp_path / "ref.pt", tmp_path / "again"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["LlamaForCausalLM", "sdpa"]
    assert record(tmp_path / "again")["tensors"] == record(folder)["tensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and (folder / "generation_config.json").is_file()


def test_a_loaded_model_can_be_saved_before_it_was_called(saved, tmp_path: Path) -> None:
    folder, result = saved
    again = fuseline.save(fuseline.load(folder, model=Mlp), tmp_path / "again")
    assert record(again)["tensors"] == record(folder)["tensors"]
    assert torch.equal(fuseline.load(again, model=Mlp)(X), result)


def test_an_instance_gets_the_saved_weights(saved) -> None:
    folder, result = saved
    instance = Mlp()
    assert fuseline.load(folder, model=instance) is instance
    assert torch.equal(instance(X), result)


# What is stored


def test_only_what_is_needed_is_stored(saved) -> None:
    folder, _ = saved
    stored = load_file(tensor_file(folder))
    assert sorted(stored) == [
        "down.bias", "down.weight/codes", "down.weight/scale", "gate.weight/codes", "gate.weight/scale",
        "norm", "up.bias", "up.weight/codes", "up.weight/scale",
    ]  # fmt: skip
    assert stored["up.weight/codes"].dtype == torch.int8
    assert not (folder / "config.json").exists() and record(folder)["plan"] is None


def test_a_parameter_that_no_graph_was_seen_to_read_is_stored(tmp_path: Path) -> None:
    model = Mlp()
    model.unused = torch.nn.Linear(8, 8)
    folder = fuseline.save(optimized(model)[0], tmp_path / "out")
    assert torch.equal(load_file(tensor_file(folder))["unused.weight"], model.unused.weight)


def test_tied_parameters_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    ids = torch.arange(4)
    model, result = optimized(Tied(), "quantize{weights=int8,only=body}", ids)
    folder = fuseline.save(model, tmp_path / "out")
    assert record(folder)["state"]["head.weight"]["same_as"] == "embed.weight"
    assert "head.weight" not in load_file(tensor_file(folder))
    loaded = fuseline.load(folder, model=Tied)
    assert loaded.head.weight is loaded.embed.weight and torch.equal(loaded(ids), result)


def test_tied_parameters_that_are_dropped_stay_tied(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    model, result = optimized(Twice(), keep_originals=False)
    folder = fuseline.save(model, tmp_path / "out")
    assert len([name for name in load_file(tensor_file(folder)) if "codes" in name]) == 1
    loaded = fuseline.load(folder, model=Twice)
    assert loaded.first.weight is loaded.second.weight and torch.equal(loaded(X), result)


class Stateful(torch.nn.Module):
    """A buffer that no checkpoint holds, a tensor that is a plain attribute, a convolution stored channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
        self.fc = torch.nn.Linear(4, 8)
        self.register_buffer("scale", torch.rand(8), persistent=False)
        self.shift = torch.rand(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3))) * self.scale + self.shift


def test_buffers_attributes_and_memory_formats_come_back(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 6, 6)
    model, result = optimized(Stateful(), "quantize{weights=int8,only=fc}", x)
    loaded = fuseline.load(fuseline.save(model, tmp_path / "out"), model=Stateful)
    assert torch.equal(loaded(x), result)
    assert torch.equal(loaded.scale, model.scale) and torch.equal(loaded.shift, model.shift)
    assert loaded.conv.weight.stride() == model.conv.weight.stride() and "scale" not in dict(loaded.named_parameters())
    assert loaded._non_persistent_buffers_set == {"scale"}


def test_a_plan_is_stored_and_used(tmp_path: Path) -> None:
    pipeline = "threshold,quantize{weights=int8}"
    with registered(Threshold):
        model, result = optimized(Net(), pipeline, calibration=BATCHES)
        folder = fuseline.save(model, tmp_path / "out")
        loaded = fuseline.load(folder, model=Net)
        assert torch.equal(loaded(X), result)
        assert fuseline.reports(loaded)[0].report["threshold"].matched == 2
        again = fuseline.save(loaded, tmp_path / "again")
    assert record(again)["plan"] == record(folder)["plan"]
    with pytest.raises(UserError, match="which cannot be read here: unknown pass 'threshold'") as caught:
        fuseline.load(folder, model=Net)
    assert "import the package that the pass comes from" in str(caught.value)


def test_the_file_is_plain_safetensors_and_aligned(tmp_path: Path) -> None:
    given = {
        "odd": torch.arange(3, dtype=torch.int8), "half": torch.rand(5).bfloat16(), "wide": torch.rand(3, 4).double(),
        "scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "flags": torch.tensor([True, False]),
        "large": torch.randn(3000, 2000),
    }  # fmt: skip
    path = tmp_path / "t.safetensors"
    size, digest = tensors.write(path, {n: Kind.of(t) for n, t in given.items()}, given.__getitem__)
    assert size == path.stat().st_size
    found, same = tensors.read(path, [n for n in given if n != "half"], torch.device("cpu"))
    assert same == digest and set(found) == set(given) - {"half"}
    for name, value in {**load_file(path), **found}.items():
        assert value.dtype == given[name].dtype and torch.equal(value, given[name]), name
    save_file(given, tmp_path / "theirs.safetensors")
    theirs, _ = tensors.read(tmp_path / "theirs.safetensors", given, torch.device("cpu"))
    assert all(torch.equal(theirs[n], t) for n, t in given.items())


# Saving: refusals, and whole or not at all


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    def refuse(use: Callable[[], object], message: str, remedy: str) -> None:
        with pytest.raises(UserError) as caught:
            use()
        assert message in str(caught.value) and remedy in str(caught.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]

    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model-00001-of-00002.safetensors").write_text("mine")
    model, _ = optimized()
    out = tmp_path / "out"
    refuse(lambda: fuseline.save(Mlp(), out), "this model was not optimized", "fuseline.optimize")
    never = fuseline.optimize(Mlp(), INT8)
    refuse(lambda: fuseline.save(never, out), "optimized and never called", "example=(input_ids,)")
    refuse(lambda: fuseline.save(model, tmp_path / "file"), "is a file, and an artifact is a folder", "")
    refuse(lambda: fuseline.save(model, tmp_path / "full"), "holds other files, and no artifact", "to a new folder")
    with registered(Threshold):
        foreign, _ = optimized(Net(), "threshold", calibration=BATCHES)
    refuse(lambda: fuseline.save(foreign, out), "could not be read back: unknown pass", "fuseline.register")
    assert (tmp_path / "full" / "model-00001-of-00002.safetensors").read_text() == "mine"


@pytest.mark.parametrize("example", [X, (X,), {"x": X}])
def test_an_example_is_enough(saved, tmp_path: Path, example) -> None:
    torch.manual_seed(0)
    model = fuseline.optimize(Mlp(), INT8)
    folder = fuseline.save(model, tmp_path / "out", example=example)
    assert record(folder)["tensors"] == record(saved[0])["tensors"]


class Killed(BaseException):
    pass


def test_an_interrupted_save_leaves_the_old_artifact_whole(saved, tmp_path: Path, monkeypatch) -> None:
    """Killed at every step that touches the disk, without any cleaning up."""
    folder, result = tmp_path / "out", saved[1]
    shutil.copytree(saved[0], folder)
    other, expected = optimized(torch.nn.Sequential(torch.nn.Linear(8, 8)))
    steps = 0

    def counted(function: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == at:
                raise Killed
            return function(*args, **kwargs)

        return call

    for at in range(1, 20):
        steps = 0
        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "replace"), (Path, "replace"), (Path, "open"), (Path, "unlink")):
                patch.setattr(module, name, counted(getattr(module, name), at))
            for module, name in ((shutil, "rmtree"), (os, "rmdir")):
                patch.setattr(module, name, lambda *a, **k: None)
            with contextlib.suppress(Killed):
                fuseline.save(other, folder)
        if steps < at:
            break
        if record(folder)["model"]["class"].endswith("Mlp"):
            assert torch.equal(fuseline.load(folder, model=Mlp)(X), result)
        else:  # the step that was interrupted came after the new manifest was in place
            assert torch.equal(
                fuseline.load(folder, model=lambda: torch.nn.Sequential(torch.nn.Linear(8, 8)))(X), expected
            )
            shutil.rmtree(folder)
            shutil.copytree(saved[0], folder)
    assert 4 < at < 19
    fuseline.save(other, folder)
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".safetensors"]  # nothing is left over


def test_a_full_disk_is_told(saved, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "out"
    shutil.copytree(saved[0], folder)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, _ = optimized(pipeline="quantize{weights=int4:g4}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="could not be written: No space left on device"):
            fuseline.save(model, folder)
    assert torch.equal(fuseline.load(folder, model=Mlp)(X), saved[1])
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}


# Loading: corrupted and foreign artifacts


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = record(folder)
    change(value)
    (folder / "fuseline.json").write_text(json.dumps(value))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Another tensor file in the place of the saved one, at its size as recorded."""
    file = tensor_file(folder)
    values = load_file(file)
    change(values)
    save_file(values, file)
    edit(folder, lambda r: r["tensors"].update(bytes=file.stat().st_size))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def foreign_plan(folder: Path, pipeline: str, model: dict[str, str]) -> None:
    plan = Plan(pipeline, model).save(folder / "plan.json")
    name = manifests.plan_name(plan)
    edit(folder, lambda r: r.update(plan=name))
    for suffix in (".json", ".safetensors"):
        plan.with_suffix(suffix).rename((folder / name).with_suffix(suffix))


def damaged_plan(folder: Path) -> None:
    foreign_plan(folder, INT8, {})
    (plan,) = folder.glob("plan-*.json")
    plan.write_text(plan.read_text() + " ")


def becomes_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


UP = "up.weight/codes"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), "no artifact at {f}: no such folder"),
    "a file": (becomes_file, "{f} is a file, and an artifact is a folder"),
    "no manifest": (lambda f: (f / "fuseline.json").unlink(), "{f} is not an artifact: it has no fuseline.json"),
    "truncated manifest": (lambda f: cut(f / "fuseline.json", 300), "fuseline.json is truncated or no JSON"),
    "empty manifest": (lambda f: cut(f / "fuseline.json", 0), "fuseline.json is truncated or no JSON"),
    "binary manifest": (lambda f: (f / "fuseline.json").write_bytes(b"\xff\xfe"), "fuseline.json is truncated or no"),
    "foreign JSON": (lambda f: (f / "fuseline.json").write_text('{"a": 1}'), "is not an artifact's manifest"),
    "a list": (lambda f: (f / "fuseline.json").write_text("[1]"), "is not an artifact's manifest"),
    "deep JSON": (lambda f: (f / "fuseline.json").write_text("[" * 100000), "fuseline.json is truncated or no JSON"),
    "another version": (lambda f: edit(f, lambda r: r.update(version=2)), "is of version 2, and this release reads ve"),
    "no tensors": (lambda f: tensor_file(f).unlink(), "lacks its tensor file model-"),
    "truncated tensors": (lambda f: cut(tensor_file(f), 700), "is not a complete safetensors file"),
    "truncated values": (lambda f: cut(tensor_file(f), -4 + tensor_file(f).stat().st_size), "it is truncated"),
    "a tensor missing": (lambda f: rewrite(f, lambda v: v.pop(UP)), f"lacks the tensor '{UP}'"),
    "another shape": (
        lambda f: rewrite(f, lambda v: v.update({UP: v[UP][:8]})),
        f"tensor '{UP}' is int8[8, 8], and fuseline.json says int8[16, 8]",
    ),
    "another dtype": (
        lambda f: rewrite(f, lambda v: v.update({UP: v[UP].view(torch.uint8)})),
        f"tensor '{UP}' is uint8[16, 8], and fuseline.json says int8[16, 8]",
    ),
    "another model's tensors": (
        lambda f: (rewrite(f, lambda v: v.update(more=X)), edit(f, lambda r: r["tensors"].update(bytes=1000))),
        "and 1000 were saved: it is not this artifact's",
    ),
    "a flipped bit": (lambda f: flip(tensor_file(f), -5), "its contents are not those that were saved"),
    "other values": (lambda f: rewrite(f, lambda v: v["norm"].zero_()), "its contents are not those that were saved"),
    "an unknown pass": (
        lambda f: edit(f, lambda r: r.update(pipeline="quantise{weights=int8}")),
        "which cannot be read here: unknown pass 'quantise'; did you mean 'quantize'",
    ),
    "an unknown option": (
        lambda f: edit(f, lambda r: r.update(pipeline="quantize{wights=int8}")),
        "which cannot be read here: pass 'quantize' has no option 'wights'",
    ),
    "a pipeline file": (lambda f: edit(f, lambda r: r.update(pipeline="/etc/passes.toml")), "it names a file"),
    "a missing plan": (lambda f: edit(f, lambda r: r.update(plan="plan-0.json")), "no plan at"),
    "a damaged plan": (damaged_plan, "its contents are not those that were saved"),
    "the plan of another pipeline": (lambda f: foreign_plan(f, "fuse", {}), "is the plan of another pipeline"),
    "the plan of another model": (
        lambda f: foreign_plan(f, INT8, {"up.weight": "float32[9, 9]"}),
        "is the plan of another model: 'up.weight' is float32[9, 9] there and float32[16, 8] here",
    ),
    "an expression missing": (lambda f: edit(f, lambda r: r["derived"][0].pop("expression")), "is damaged: KeyError"),
    "an unknown expression": (
        lambda f: edit(f, lambda r: r["derived"][0]["expression"].update(op="run")),
        "is damaged: FuselineError: unknown weight expression 'run'",
    ),
    "an expression of nothing": (
        lambda f: edit(f, lambda r: r["state"].pop("up.weight")),
        "fuseline.json is damaged: KeyError: 'up.weight'",
    ),
    "an unknown dtype": (
        lambda f: edit(f, lambda r: r["state"]["norm"].update(dtype="load")),
        "is damaged: ValueError: unknown dtype 'load'",
    ),
    "an impossible shape": (
        lambda f: edit(f, lambda r: r["state"]["norm"].update(shape=[-1])),
        "is damaged: ValueError: [-1] is no shape",
    ),
    "a file elsewhere": (
        lambda f: edit(f, lambda r: r["tensors"].update(file="../other.safetensors")),
        "'../other.safetensors' is not the name of a file in the artifact",
    ),
    "a tie in a circle": (
        lambda f: edit(f, lambda r: r["state"]["norm"].update(same_as="norm")),
        "'norm' is the same as 'norm'",
    ),
    "another model's state": (
        lambda f: edit(f, lambda r: r["state"].pop("up.bias")),
        "Mlp is not the model that was saved: it has a parameter 'up.bias', and the artifact none",
    ),
}


def test_ten_and_more_broken_artifacts_give_ten_and_more_errors(saved, tmp_path: Path) -> None:
    messages = set()
    for name, (damage, message) in BROKEN.items():
        folder = tmp_path / name.replace(" ", "-")
        shutil.copytree(saved[0], folder)
        damage(folder)
        before = {p: p.read_bytes() for p in folder.glob("*")} if folder.is_dir() else {}
        instance = Mlp()
        untouched = {n: (id(p), p.clone()) for n, p in instance.named_parameters()}
        with pytest.raises(UserError) as caught:
            fuseline.load(folder, model=instance)
        text = str(caught.value)
        assert message.format(f=folder) in text, (name, text)
        assert caught.value.exit_code == 2
        messages.add(text.splitlines()[0])
        assert {p: p.read_bytes() for p in before} == before, name  # nothing is lost
        assert instance._compiled_call_impl is None
        for n, p in instance.named_parameters():
            assert id(p) == untouched[n][0] and torch.equal(p, untouched[n][1]), name
    assert len(messages) >= len(BROKEN) - 3


class Listed(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.tables = [torch.ones(8)]


def test_the_model_must_be_the_one_that_was_saved(saved) -> None:
    def refuse(model: Any, message: str, remedy: str, **settings: Any) -> None:
        with pytest.raises(UserError) as caught:
            fuseline.load(saved[0], model, **settings)
        assert message in str(caught.value) and remedy in str(caught.value), caught.value

    refuse(None, "Mlp, which is no class of transformers", "fuseline.load(path, model=lambda: Net(…))")
    refuse(lambda: Mlp(16), "'norm' is float32[16] here and float32[8] there", "the same class, sizes and edits")
    refuse(Tied, "Tied is not the model that was saved: it has a parameter 'embed.weight'", "build the same module")
    refuse(lambda: 3, "model= gave a int, not a torch.nn.Module", "")
    refuse("Mlp", "model= is a function without arguments or a module, not str", "")
    refuse(Listed, "'tables' of Listed holds a tensor that the artifact has no values for", "register_buffer")
    refuse(lambda: Mlp(int(torch.ones(1).item())), "could not be built without its weights", "model=Net()")
    refuse(Mlp, "nothing can be loaded to the device 'meta'", "device='cpu'", device="meta")
    refuse(Mlp, "nothing can be loaded to the device 'nowhere'", "device='cpu'", device="nowhere")
    refuse(Mlp, "unknown target 'trito'; did you mean 'triton'", "", target="trito")
    assert torch.equal(fuseline.load(saved[0], Listed())(X), saved[1])  # an instance has the values


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory) -> Path:
    ids = torch.arange(4)[None]
    model = fuseline.optimize(tiny_llama(num_hidden_layers=1), INT8)
    return fuseline.save(model, tmp_path_factory.mktemp("artifacts") / "llama", example=(ids,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "NoSuchModel"}, "has no model class 'NoSuchModel'"),
        ({"class": "pipeline"}, "has no model class 'pipeline'"),
        ({"class": "AutoModel"}, "has no model class 'AutoModel'"),
        ({"class": "os.system"}, "has no model class 'os.system'"),
        ({"class": None}, "has no model class None"),
        ({"library": "os"}, "which is no class of transformers"),
        ({"attention": {"": "someone/kernel"}}, "'someone/kernel', which is fetched from a hub"),
        ({"experts": {"": "someone/kernel"}}, "'someone/kernel', which is fetched from a hub"),
        ({"config": {"hidden_size": "large"}}, "LlamaForCausalLM could not be built without its weights"),
        ({"config": {}}, "LlamaForCausalLM is not the model that was saved"),
        ({"class": "BertModel"}, "is not the model that was saved"),
    ],
)
def test_a_file_imports_and_fetches_nothing(saved_llama: Path, tmp_path: Path, change: dict, message: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(saved_llama, folder)
    edit(folder, lambda r: r["model"].update(change))
    before = set(sys.modules)
    with pytest.raises(UserError) as caught:
        fuseline.load(folder)
    assert message in str(caught.value)
    assert not {m for m in set(sys.modules) - before if not m.startswith("transformers")} & {"someone", "os.system"}


@pytest.mark.slow
def test_the_example_in_the_documentation_runs(tmp_path: Path) -> None:
    page = Path(fuseline.__file__).parent.parent / "docs" / "saving.md"
    code, *_ = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "example.py").write_text(code)
    root = os.pathsep.join([str(page.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor([[  0,   1,   2")
