"""`gguf-codes:FILE`: the same weights as `gguf:FILE` to the bit, over the file's codes."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from fuseline.models import load
from fuseline.models.coded import CodedLinear
from tests.models.test_gguf import cache, write_llama  # noqa: F401

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

KINDS = {
    "Q4_0": "int4:g32:sym", "Q5_0": "int5:g32:sym", "Q8_0": "int8:g32:sym", "Q6_K": "int6:g16:sym", "MXFP4": "mxfp4",
}  # fmt: skip


def random_blocks(kind: str, rows: int, channels: int, rng: numpy.random.Generator) -> numpy.ndarray:
    """Bytes of a tensor of this type: any codes, scales near 1/8."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * channels // elements, size), dtype=numpy.uint8)
    scales = rng.uniform(0.01, 0.1, len(blocks)).astype(numpy.float16).view(numpy.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(118, 125, len(blocks))
    elif kind == "Q6_K":
        blocks[:, 208:] = scales
    elif kind == "Q4_1":
        blocks[:, :2], blocks[:, 2:4] = scales, scales
    else:
        blocks[:, :2] = scales
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Queries and keys too, whose rows transformers moves; one tensor has a minimum, and is dequantized."""
    rng = numpy.random.default_rng(0)
    hidden = 256 if kind == "Q6_K" else 32
    path = write_llama(
        tmp_path / "tiny.gguf",
        hidden=hidden,
        blocks=lambda name, shape: (
            random_blocks("Q4_1" if "down" in name else kind, *shape, rng), "Q4_1" if "down" in name else kind
        ) if name.startswith("blk.0.") and "norm" not in name else None,
    )  # fmt: skip
    plain, coded = load(f"gguf:{path}").model, load(f"gguf-codes:{path}").model
    linears = {name: m for name, m in coded.named_modules() if isinstance(m, CodedLinear)}
    assert len(linears) == 6 and {str(m.scheme) for m in linears.values()} == {KINDS[kind]}
    for name, module in linears.items():
        assert torch.equal(module.weight, plain.get_submodule(name).weight)
    assert "6 linears are kept as codes; dequantized are 1 of F32, 1 of Q4_1" in capsys.readouterr().err
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(coded(ids).logits, plain(ids).logits)
        assert torch.equal(load(f"gguf-codes:{path}").model(ids).logits, plain(ids).logits), "from the cache"
