"""Recipes: names for pipelines, wherever a pipeline's text is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import Pipeline, UserError
from fuseline.compiler.recipes import Recipe, recipes, register_recipe
from tests.helpers.models import Mlp, error

NAMES = ["w8a8", "w4a16", "w4a8", "w4a4kv4-rotated", "fp8", "mxfp4", "ternary-qat"]


def test_the_recipes_of_this_package() -> None:
    assert set(NAMES) <= set(recipes())
    for recipe in recipes().values():
        pipeline = Pipeline(recipe.name)
        assert pipeline == Pipeline(recipe.pipeline) and str(pipeline) == recipe.pipeline
        assert pipeline.lossy and pipeline.passes[-1].name == "fuse"
        trained = any(step.is_trained for step in pipeline.passes)
        assert ("needs training" in recipe.summary) == trained
        assert ("needs data" in recipe.summary) == (pipeline.needs_data and not trained)


def test_a_recipe_is_an_item_among_passes(tmp_path: Path) -> None:
    assert str(Pipeline("mxfp4")) == recipes()["mxfp4"].pipeline
    assert Pipeline(" raise , mxfp4") == Pipeline(f"raise,{recipes()['mxfp4'].pipeline}")
    path = tmp_path / "steps.toml"
    path.write_text('[[pass]]\nname = "w8a8"\n[[pass]]\nname = "fuse"\nallow_empty = true\n')
    assert Pipeline(path) == Pipeline("w8a8,fuse{allow_empty}")


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="did you mean 'w4a16'"):
        Pipeline("w4a61")
    with pytest.raises(UserError, match="'w8a8' is a recipe, and takes no options") as caught:
        Pipeline("w8a8{group=64}")
    assert recipes()["w8a8"].pipeline in caught.value.details[0]
    with pytest.raises(ValueError, match="two recipes are called 'w8a8'"):
        register_recipe(Recipe("w8a8", "raise", "another"))


@torch.no_grad()
def test_everywhere_a_pipeline_is_taken() -> None:
    torch.manual_seed(0)
    model, x = Mlp(64, 128), torch.randn(4, 64)
    expected = model(x)
    compiled = torch.compile(Mlp(64, 128), backend="fuseline", options={"pipeline": "mxfp4"})
    compiled.load_state_dict({f"_orig_mod.{k}": v for k, v in model.state_dict().items()})
    assert 1e-4 < error(compiled(x), expected) < 0.2
    with pytest.raises(UserError, match="decides from data"):
        fuseline.optimize(Mlp(64, 128), "w4a16")
    data = [torch.randn(64, 64) for _ in range(2)]
    optimized = fuseline.optimize(model, "w4a16", calibration=data)
    assert 1e-4 < error(optimized(x), expected) < 0.2
    assert fuseline.reports(optimized)[0].report.pipeline == recipes()["w4a16"].pipeline


def test_a_recipe_that_is_trained() -> None:
    torch.manual_seed(0)
    model, x = Mlp(32, 64), torch.randn(8, 32)
    with pytest.raises(UserError, match="takes what training found, and there is nothing yet") as caught:
        fuseline.optimize(copy.deepcopy(model), "ternary-qat")
    assert "fuseline.prepare_qat(model" in caught.value.details[0] and "convert" in str(caught.value.remedy)
    expected = model(x).detach()
    qat = fuseline.prepare_qat(model, "ternary-qat", (x,))
    optimizer = torch.optim.AdamW(qat.parameters(), 1e-2, weight_decay=0.0)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.mse_loss(qat(x), expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    with torch.no_grad():
        trained = qat.eval()(x)
        converted = fuseline.convert(qat)
        assert torch.equal(converted(x), trained)
    assert fuseline.reports(converted)[0].report.pipeline == recipes()["ternary-qat"].pipeline
