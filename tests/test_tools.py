"""In others' tools: every example of examples/tools runs; exports pass the parsers of those that read them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "examples" / "tools"
#: Example → the packages it needs, and what it prints.
EXPECTED = {
    "trainer": (("transformers", "accelerate"), r"loss \d\.\d+; raise rewrote 13 sites"),
    "accelerate_loop": (("accelerate",), r"loss 4\.\d+ → [123]\.\d+; raise rewrote 7 sites"),
    "peft_lora": (("transformers", "peft"), r"rotate rewrote 29 sites; 8 trained\nmerged, the logits differ by 0e\+00"),
    "lightning_module": (("lightning",), r"loss [34]\.\d+; raise rewrote 7 sites"),
    "lm_eval_artifact": (("transformers", "lm_eval"), r"acc (?:0\.[89]\d+|1\.000)\n"),
}
LONG = {"trainer", "lightning_module", "lm_eval_artifact", "peft_lora"}


def run(*command: str, folder: Path) -> str:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    variables = {**os.environ, "PYTHONPATH": paths, "FUSELINE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in EXPECTED])
def test_example(name: str, tmp_path: Path) -> None:
    packages, printed = EXPECTED[name]
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package.replace('_', '-')}")
    assert re.search(printed, out := run(str(TOOLS / f"{name}.py"), folder=tmp_path)), out


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_fsdp2(tmp_path: Path) -> None:
    """Two processes over gloo, as `torchrun` starts them."""
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    out = run(*launch, str(TOOLS / "fsdp2.py"), folder=tmp_path)
    assert re.search(r"loss 4\.\d+ → [123]\.\d+; raise rewrote 6 sites", out), out


def test_each_example_is_run() -> None:
    assert {path.stem for path in TOOLS.glob("*.py")} == {*EXPECTED, "fsdp2"}


def test_accelerate_takes_the_name_once_it_was_told() -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    from accelerate.utils import DynamoBackend, TorchDynamoPlugin

    import fuseline.integrations

    before = list(DynamoBackend)
    fuseline.integrations.add_backend()
    assert list(DynamoBackend) == before and "fuseline" in [str(b).lower() for b in before]
    assert TorchDynamoPlugin(backend="fuseline").to_dict()["backend"] == "fuseline"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in the format of compressed-tensors, as `fuseline.export` writes it."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fuseline[hf]'")
    import fuseline
    from fuseline.models import load

    folder = tmp_path_factory.mktemp("exported")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        fuseline.export(
            load("demo:tiny-llama").model, folder / "out", "raise,quantize{weights=int4:g32:sym}",
            format="compressed-tensors", example={"input_ids": ids, "use_cache": False}, check=False,
        )  # fmt: skip
    return folder / "out"


def quantization(exported: Path) -> dict:
    return json.loads((exported / "config.json").read_text())["quantization_config"]


def test_compressed_tensors_parses_the_export(exported: Path) -> None:
    package = pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    config = package.quantization.QuantizationConfig.model_validate(quantization(exported))
    (group,) = config.config_groups.values()
    assert (group.weights.num_bits, group.weights.group_size, group.weights.symmetric) == (4, 32, True)


def test_transformers_parses_the_export(exported: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from transformers import AutoConfig
    from transformers.utils.quantization_config import CompressedTensorsConfig

    config = AutoConfig.from_pretrained(exported)
    parsed = CompressedTensorsConfig.from_dict(quantization(exported))
    assert parsed.quantization_config is not None and config.quantization_config["quant_method"] == "compressed-tensors"


def test_vllm_parses_the_export(exported: Path) -> None:
    """Its parser alone, which reads what `config.json` says before any layer is made."""
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed: pip install vllm")
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    parsed = CompressedTensorsConfig.from_config(quantization(exported))
    (scheme,) = parsed.target_scheme_map.values()
    assert scheme["weights"].num_bits == 4 and "lm_head" in parsed.ignore
