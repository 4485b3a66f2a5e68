"""Rotations at run time: `transform_config`, the stored matrices, and compressed-tensors' reading of both."""

from __future__ import annotations

import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline.compiler.precision import error
from fuseline.exporting.rotations import Matrix
from fuseline.exporting.transforms import Transforms

pytest.importorskip("transformers")

from tests.exporting.plain import config_of, loaded, logits, model_of, sylvester, tensors_of, with_input_rotations

#: Pipeline → the type and size of each group.
INPUTS = {
    "raise,rotate{r4,block=32}": ("hadamard", 32),
    "raise,rotate{r1,r2,r4,untie}": ("random-hadamard", 96),
    "raise,rotate{r4,block=32,kind=random-hadamard,seed=3}": ("random-hadamard", 32),
    "raise,rotate{r4,kind=orthogonal,seed=2}": ("random-hadamard", 96),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("pipeline", INPUTS)
def test_the_text_and_the_matrices_say_it_all(pipeline: str, tmp_path: Path) -> None:
    model = model_of("Llama")
    fuseline.export(model, tmp_path / "out", pipeline)
    quantization = config_of(tmp_path / "out")["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    (name, group), *none = quantization["transform_config"]["config_groups"].items()
    kind, size = INPUTS[pipeline]
    assert not none and name == "R4" and (group["type"], group["head_dim"]) == (kind, size)
    assert group["apply"][0]["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    stored = [n for n in tensors_of(tmp_path / "out") if "R4_input" in n]
    assert stored == (["model.layers.0.mlp.down_proj.R4_input.weight"] if kind != "hadamard" else [])
    assert error(logits(with_input_rotations(tmp_path / "out")), logits(model)) < 1e-5
    assert error(logits(loaded(tmp_path / "out")), logits(model)) > 1e-2, "without them it is another model"


def test_stored_matrices() -> None:
    signs = Transforms({}, {"m": Matrix("random-hadamard", 12, 7)}).tensor("m", torch.bfloat16)
    assert signs.dtype == torch.bfloat16 and set(signs.flatten().tolist()) == {1.0, -1.0}
    dense = Transforms({}, {"m": Matrix("orthogonal", 12, 7)}).tensor("m", torch.bfloat16)
    assert dense.dtype == torch.float32
    assert error(dense.double() @ dense.double().T, 12 * torch.eye(12)) < 1e-6
    assert torch.allclose(Matrix("hadamard", 32).values() * 32**0.5, sylvester(32).double())


needs_package = pytest.mark.skipif(
    find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed: pip install compressed-tensors",
)


@needs_package
@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    "pipeline",
    [*INPUTS, "raise,rotate{r3}", "raise,rotate{r1,r2,r3,r4,untie}", "raise,rotate{r3,kind=random-hadamard,seed=1}"],
)
def test_compressed_tensors_reads_it(pipeline: str, tmp_path: Path) -> None:
    written = fuseline.export(model_of("Llama"), tmp_path / "out", pipeline)
    assert written.unchecked is None and written.error is not None and written.error < 1e-5


@needs_package
@pytest.mark.slow
def test_the_loader_of_the_manual(tmp_path: Path) -> None:
    model = model_of("Llama")
    fuseline.export(model, tmp_path / "out", "raise,rotate{r1,r3,r4,kind=random-hadamard,seed=1,untie}", check=False)
    text = (Path(__file__).parents[2] / "docs" / "saving.md").read_text()
    (block,) = re.findall(r"^```python\n(# load_transforms.py\n.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "load_transforms.py").write_text(block)
    load = runpy.run_path(str(tmp_path / "load_transforms.py"))["load_with_transforms"]
    assert error(logits(load(tmp_path / "out").eval()), logits(model)) < 1e-5


@needs_package
def test_which_matrices_are_theirs() -> None:
    """Powers of two agree; other orders are another matrix there, so that ours is stored."""
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix, random_hadamard_matrix

    for n in (2, 16, 128):
        theirs = deterministic_hadamard_matrix(n, torch.float64) / n**0.5
        assert error(theirs, Matrix("hadamard", n).values()) < 1e-15
    with pytest.raises(ValueError, match=r"2\^n"):
        deterministic_hadamard_matrix(96)
    ours = Matrix("hadamard", 96).values() * 96**0.5
    theirs = random_hadamard_matrix(96, torch.float64, gen=torch.Generator().manual_seed(0))
    assert not torch.allclose(theirs.abs() * ours, theirs)


@pytest.mark.skipif(find_spec("compressed_tensors") is not None, reason="it is installed")
def test_without_the_package_the_check_says_so(tmp_path: Path) -> None:
    written = fuseline.export(model_of("Llama"), tmp_path / "out", "raise,rotate{r4}")
    assert written.error is None and "compressed-tensors, which is not installed" in (written.unchecked or "")


def test_transformers_does_not_load_it_as_another_model(tmp_path: Path) -> None:
    """Plain transformers ignores the transforms; it fails rather than load weights that need them."""
    import transformers

    fuseline.export(model_of("Llama"), tmp_path / "out", "raise,rotate{r4}", check=False)
    with pytest.raises((ImportError, AttributeError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
