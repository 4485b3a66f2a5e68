"""GPTQ and AWQ checkpoints of a tiny Llama, packed in numpy bit by bit from the formats' descriptions.

Nothing here is of the package but the family table's model, so that a reader is held to the text and not to itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.exporting.plain import model_of

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the first axis as a stream of bits, low ones first, in int32 words along the same axis."""
    n, columns = codes.shape
    ones = (codes[:, None, :].astype(np.uint64) >> np.arange(bits, dtype=np.uint64)[None, :, None]) & np.uint64(1)
    lines = ones.reshape(n * bits // 32, 32, columns)
    weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
    return (lines * weights[None, :, None]).sum(1, dtype=np.uint64).astype(np.uint32).view(np.int32)


def planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The same of format gptq_p: each 32 codes in planes of 4, 2 and 1 bits, the low ones first."""
    runs = []
    for start in range(0, len(codes), 32):
        low = 0
        for width in (8, 4, 2, 1):
            if bits - low >= width:
                runs.append(stream(codes[start : start + 32] >> low & 2**width - 1, width))
                low += width
    return np.concatenate(runs)


def awq_words(codes: np.ndarray) -> np.ndarray:
    """[n, out] → int32 [n, out / 8]: nibble i of a word is output AWQ_ORDER[i] of its eight."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for place, output in enumerate(AWQ_ORDER):
        words |= codes[:, output::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


@dataclass
class Written:
    """folder; weights: each linear's as its codes stand for it, float64, by the module's name."""

    folder: Path
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def edit(self, change: Any) -> None:
        """Rewrites the tensors."""
        path = self.folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    def config(self, **changes: Any) -> None:
        """Changes `quantization_config`."""
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= changes
        path.write_text(json.dumps(config))


def plain(written: Written, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The same model with the weights that the codes stand for."""
    model = model_of("Llama").to(dtype)
    state = model.state_dict()
    for name, tensor in load_file(written.folder / "model.safetensors").items():
        if name in state:
            state[name] = tensor.to(dtype)
    state |= {f"{name}.weight": weight.to(dtype) for name, weight in written.weights.items()}
    model.load_state_dict(state)
    return model


def write(
    folder: Path,
    method: str,
    *,
    bits: int = 4,
    group: int = 16,
    symmetric: bool = False,
    ordered: bool = False,
    zeros_less: int = 0,
    seed: int = 0,
    **config: Any,
) -> Written:
    """A checkpoint with random codes, zero points and scales in the place of every linear's weight but the head's.

    zeros_less: what is taken from zero points before they are stored.
    """
    rng = np.random.default_rng(seed)
    model = model_of("Llama")
    model.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    written = Written(folder)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        out, channels = module.weight.shape
        size = channels if group < 0 else group
        groups = channels // size
        codes = rng.integers(0, 2**bits, (channels, out))
        low, high = zeros_less, 2**bits - 1
        zeros = np.full((groups, out), 2 ** (bits - 1)) if symmetric else rng.integers(low, high + 1, (groups, out))
        scales = (rng.uniform(0.3, 1.0, (groups, out)) / channels**0.5 / 2 ** (bits - 1)).astype(np.float16)
        index = np.arange(channels) // size
        if ordered:
            index = rng.permutation(index)
        values = (codes - zeros[index]) * scales[index].astype(np.float64)
        written.weights[name] = torch.from_numpy(values.T.copy())
        del state[f"{name}.weight"]
        if method == "awq":
            parts = {"qweight": awq_words(codes), "qzeros": awq_words(zeros)}
        else:
            pack = planes if config.get("checkpoint_format") == "gptq_p" else stream
            parts = {
                "qweight": pack(codes, bits),
                "qzeros": pack((zeros - zeros_less).T, bits).T,
                "g_idx": index.astype(np.int32),
            }
        parts["scales"] = scales
        state |= {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(value)) for part, value in parts.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    described = {"quant_method": method, "bits": bits, "group_size": group}
    if method == "gptq":
        described |= {"sym": symmetric, "desc_act": ordered}
    else:
        described |= {"version": "gemm", "zero_point": True}
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": described | config}))
    return written
