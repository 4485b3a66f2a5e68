"""fuseline.export: what it writes loads in plain transformers and computes what the model computed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline.compiler.hadamard import hadamard_matrix, random_signs
from fuseline.compiler.precision import error

pytest.importorskip("transformers")

import transformers

from fuseline.exporting.parameters import Assignment
from tests.exporting.plain import IDS, config_of, loaded, logits, model_of, tensors_of
from tests.families.decoders import build

ROTATED = "raise,rotate{r1,r2,untie,kind=random-hadamard,seed=5}"
#: Biases, joint q/k/v, norms behind the blocks with 1 + w (so that r1 is refused), stacked experts.
FAMILIES = ["Qwen 2", "Phi 3", "Gemma 2", "Mixtral, grouped_mm", "Llama", "Qwen 3", "Mistral", "Qwen 3 MoE, grouped_mm",
            "Gemma", "Granite", "OLMo 2", "DeepSeek V2, grouped_mm"]  # fmt: skip
BOUNDARY = {"Gemma 2", "OLMo 2"}


@pytest.mark.one_in(12)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_loads_in_plain_transformers(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    before = logits(model)
    written = fuseline.export(model, tmp_path / "out", ROTATED)
    again = loaded(tmp_path / "out")
    assert type(again) is type(model)
    assert error(logits(again), before) < 1e-5
    assert torch.equal(logits(model), before), "the model itself is as it was"
    assert written.error is not None and written.error < 1e-5 and written.transforms is None
    assert written.changed and written.unread == []
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, again.state_dict()[n])]
    assert len(changed) == written.changed + written.neutral
    assert bool(written.neutral) == (name not in BOUNDARY)
    refused = " ".join(written.passes[-1].refused.values())
    assert ("would be left at run time" in refused) == (name in BOUNDARY)


@pytest.mark.slow
def test_the_checkpoint_needs_no_fuseline(tmp_path: Path) -> None:
    model = model_of("Qwen 2")
    fuseline.export(model, tmp_path / "out", ROTATED)
    torch.save(logits(model), tmp_path / "expected.pt")
    script = f"""
import sys
sys.modules["fuseline"] = None  # importing it is an error
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
with torch.no_grad():
    found = model(input_ids=torch.tensor({IDS.tolist()}), use_cache=False).logits
expected = torch.load("expected.pt")
print(float((found - expected).abs().max() / expected.abs().max()))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_what_becomes_of_tied_tables_and_norms(tmp_path: Path) -> None:
    model = build("LlamaConfig", tie_word_embeddings=True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    fuseline.export(model, tmp_path / "out", "raise,rotate{r1,untie}")
    again, config = loaded(tmp_path / "out"), config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False and model.config.tie_word_embeddings is True
    table, scale = model.lm_head.weight.double(), model.model.norm.weight.double()
    turned = hadamard_matrix(64)
    assert error(again.model.embed_tokens.weight, table @ turned) < 1e-6
    assert error(again.lm_head.weight, (table * scale) @ turned) < 1e-6
    assert all(bool((p == 1).all()) for n, p in again.named_parameters() if "norm" in n)
    assert error(logits(again), logits(model)) < 1e-5


@pytest.mark.slow
def test_a_norm_of_one_plus_w_becomes_zero(tmp_path: Path) -> None:
    model = model_of("Gemma")
    assert fuseline.export(model, tmp_path / "out", ROTATED).neutral == 5
    assert all(bool((t == 0).all()) for n, t in tensors_of(tmp_path / "out").items() if "norm" in n)


def test_tables_stay_tied_where_they_are_not_rotated(tmp_path: Path) -> None:
    model = build("LlamaConfig", tie_word_embeddings=True).eval()
    fuseline.export(model, tmp_path / "out", "raise,rotate{r2}")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def test_the_record_says_what_was_folded(tmp_path: Path) -> None:
    fuseline.export(model_of("Llama"), tmp_path / "out", ROTATED, check=False)
    record = json.loads((tmp_path / "out" / "fuseline_rotations.json").read_text())
    assert record["version"] == 1 and fuseline.Pipeline(record["pipeline"]) == fuseline.Pipeline(ROTATED)
    width, head = record["rotations"]
    assert [(r["kind"], r["block"], r["seed"]) for r in (width, head)] == [
        ("random-hadamard", 64, 5), ("random-hadamard", 16, 5)
    ]  # fmt: skip
    signs = torch.tensor(random_signs(64, 5), dtype=torch.int8).numpy().tobytes()
    assert width["signs_sha256"] == hashlib.sha256(signs).hexdigest()
    assert {"parameter": "model.embed_tokens.weight", "dimension": 1, "how": "folded"} in width["sites"]
    assert [s["parameter"] for s in head["sites"] if s["dimension"] == 0] == [
        f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)
    ]


def test_an_optimized_model_brings_its_pipeline(tmp_path: Path) -> None:
    model = model_of("Llama")
    before = logits(model)
    fuseline.optimize(model, "raise,rotate{r1,r2,untie},fuse")
    with torch.no_grad():
        optimized = logits(model)
    fuseline.export(model, tmp_path / "out")
    assert error(logits(loaded(tmp_path / "out")), before) < 1e-5
    assert torch.equal(logits(model), optimized), "it is still optimized"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert not generation.get("disable_compile"), "a setting of fuseline.optimize"


@pytest.mark.slow
def test_learned_matrices_come_from_the_plan(tmp_path: Path) -> None:
    model = model_of("Llama")
    before = logits(model)
    pipeline = "raise,rotate{r1,r2,untie,kind=learned,steps=1}"
    plan = fuseline.analyze(model, f"{pipeline},quantize{{weights=int4:g32}}", [{"input_ids": IDS, "use_cache": False}])
    written = fuseline.export(model, tmp_path / "out", pipeline, plan=plan)
    assert written.error is not None and written.error < 1e-5
    assert {one["kind"] for one in written.rotations} == {"learned"} and len(written.rotations) == 3
    assert error(logits(loaded(tmp_path / "out")), before) < 1e-5
    with pytest.raises(fuseline.UserError, match="calibrat"):
        fuseline.export(model, tmp_path / "other", pipeline)


def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path) -> None:
    model = model_of("Llama").to(torch.bfloat16)
    written = fuseline.export(model, tmp_path / "out", ROTATED)
    assert written.error is not None
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert error(logits(loaded(tmp_path / "out")), logits(model)) < 5e-2


def test_files_of_the_source_are_carried_along(tmp_path: Path) -> None:
    model_of("Llama").save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "source" / "README.md").write_text("about other weights")
    source = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    written = fuseline.export(source, tmp_path / "out", ROTATED)
    assert written.carried == ["tokenizer.json"] and not (tmp_path / "out" / "README.md").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_what_the_graph_does_not_read_is_copied(tmp_path: Path) -> None:
    model = model_of("Llama")
    model.spare = torch.nn.Parameter(torch.randn(3))
    assert fuseline.export(model, tmp_path / "out", ROTATED, check=False).unread == ["spare"]
    assert torch.equal(tensors_of(tmp_path / "out")["spare"], model.spare)


class Test_nothing_is_left_half_written:
    def test_a_wrong_value_fails_the_check(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        right = Assignment.evaluate

        def wrong(self: Assignment, name: str, like: torch.Tensor) -> torch.Tensor:
            return right(self, name, like) * (1.01 if name.endswith("1.mlp.up_proj.weight") else 1.0)

        monkeypatch.setattr(Assignment, "evaluate", wrong)
        with pytest.raises(fuseline.FuselineError, match=r"is off by .*e-0\d of the largest output"):
            fuseline.export(model_of("Llama"), tmp_path / "out", ROTATED)
        assert list(tmp_path.iterdir()) == []

    def test_an_older_checkpoint_stays_until_the_new_one_is_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, target, other = model_of("Llama"), tmp_path / "out", "raise,rotate{r2,kind=random-hadamard}"
        fuseline.export(model, target, "raise,rotate{r2}", check=False)
        older = {p.name: p.read_bytes() for p in target.iterdir()}
        with pytest.raises(fuseline.UserError, match="exists already"):
            fuseline.export(model, target, other)

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as context:
            context.setattr(Assignment, "evaluate", full)
            with pytest.raises(fuseline.UserError, match="No space left"):
                fuseline.export(model, target, other, force=True)
        assert {p.name: p.read_bytes() for p in target.iterdir()} == older
        fuseline.export(model, target, other, force=True, check=False)
        assert (target / "fuseline_rotations.json").read_bytes() != older["fuseline_rotations.json"]
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_other_folders_are_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("…")
        with pytest.raises(fuseline.UserError, match="is no checkpoint, and is not replaced"):
            fuseline.export(model_of("Llama"), tmp_path, ROTATED, force=True)


@pytest.mark.slow
def test_the_example_of_the_manual(tmp_path: Path) -> None:
    root = Path(fuseline.__file__).parents[1]
    text = (root / "docs" / "saving.md").read_text(encoding="utf-8")
    (code,) = [b for b in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if "export(" in b]
    (tmp_path / "example.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("16 5 ")


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    from fuseline.models import load

    source = load("demo:smollm2")
    ids = torch.tensor([source.encode("The compiler rotates the residual stream, and nobody notices.")])
    with torch.no_grad():
        before = source.model(ids, use_cache=False).logits
    written = fuseline.export(source.model, tmp_path / "out", "raise,rotate{r1,r2,untie}")
    assert written.neutral == 61 and written.changed == 30 * 7 + 2 and written.copied == 0
    again = load(f"hf:{tmp_path / 'out'}")
    with torch.no_grad():
        assert error(again.model(ids, use_cache=False).logits, before) < 1e-5
    assert again.encode("rotated") == source.encode("rotated")
