"""Models that were loaded over codes, exported: transformers reads the same weights from other names."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import fuseline
from fuseline.compiler.precision import error
from fuseline.models import load
from fuseline.models.coded import CodedLinear

pytest.importorskip("transformers")

import transformers

from tests.exporting.plain import config_of, logits
from tests.models.checkpoints import plain, write

needs_package = pytest.mark.skipif(
    find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed: pip install compressed-tensors",
)
FORMAT = "compressed-tensors"
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptq": ("gptq", {"zeros_less": 1}, "pack-quantized"),
    "gptq symmetric, rows": ("gptq", {"symmetric": True, "zeros_less": 1, "group": -1, "bits": 8}, "pack-quantized"),
    "gptq 3 bits": ("gptq", {"zeros_less": 1, "bits": 3}, "int-quantized"),
    "awq": ("awq", {}, "pack-quantized"),
}


@needs_package
@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_codes(kind: str, tmp_path: Path) -> None:
    method, options, name = KINDS[kind]
    source = write(tmp_path / "in", method, **options)
    model = load(f"hf:{source.folder}").model
    written = fuseline.export(model, tmp_path / "out", format=FORMAT)
    assert written.unchecked is None and written.error is not None and written.error < 1e-5
    assert config_of(tmp_path / "out")["quantization_config"]["format"] == name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert error(logits(theirs), logits(model)) < 1e-5
    again = load(f"hf:{tmp_path / 'out'}").model
    for path, module in model.named_modules():
        if isinstance(module, CodedLinear):
            assert torch.equal(again.get_submodule(path).codes, module.codes) or name == "int-quantized"
            assert torch.equal(again.get_submodule(path).weight, module.weight)
            assert torch.equal(theirs.get_submodule(path).weight, module.weight)
    assert error(logits(again), logits(plain(source, torch.float32))) < 1e-5


@needs_package
def test_a_checkpoint_of_compressed_tensors_comes_out_as_it_was(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = Path(__file__).parent.parent / "models" / "llm_compressor"
    fuseline.export(load(f"hf:{folder}").model, tmp_path / "out", format=FORMAT)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())


def refused(folder: Path, source: Path, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> str:
    with pytest.raises(fuseline.UserError) as raised:
        fuseline.export(load(f"hf:{source}", dtype).model, folder, *args, **kwargs)
    assert not folder.exists()
    return str(raised.value)


@pytest.mark.slow
def test_refusals(tmp_path: Path) -> None:
    awq, out = write(tmp_path / "awq", "awq").folder, tmp_path / "out"
    assert "and a plain checkpoint has no place for them" in refused(out, awq)
    assert "'rotate{r1,untie}' does not change" in refused(out, awq, "raise,rotate{r1,untie}", format=FORMAT)
    reason = refused(out, awq, format=FORMAT, dtype=torch.bfloat16)
    assert "are float16, and the model is bfloat16, which does not hold them" in reason
    ordered = write(tmp_path / "gptq", "gptq", ordered=True, zeros_less=1).folder
    assert "which compressed-tensors cannot say" in refused(out, ordered, format=FORMAT)
