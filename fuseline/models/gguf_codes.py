"""`gguf-codes:FILE`: tensors of a GGUF file as codes, where a number format holds them exactly.

    Q4_0, Q5_0, Q8_0    int4, int5, int8 in groups of 32, float16 scales
    Q6_K                int6 in groups of 16, scales d·sc in float32, which holds the product
    MXFP4               mxfp4

Types with a minimum beside the scale (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K) have no integer zero point, and others (Q3_K, IQ…)
are not unpacked here: these linears are dequantized, as `gguf:FILE` does with all. transformers' reader moves rows of
some tensors, so codes are matched with the weights that it made: a linear is kept as codes only if they expand to its
weight to the bit. Format: github.com/ggml-org/ggml, ggml-quants.c.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fuseline.compiler.schemes import Scheme
from fuseline.models.coded import CodedLinear, Codes, StoredLinear
from fuseline.models.headers import Headers
from fuseline.models.qweights import refused, replace_linears

METHOD = "gguf-codes"
Blocks = np.ndarray


def _halves(blocks: Blocks) -> np.ndarray:
    """uint8 [n, 16] → [n, 32]: the low halves are the first 16 codes."""
    return np.concatenate((blocks & 15, blocks >> 4), -1)


def _scale(blocks: Blocks) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16)


def _q4_0(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    return _halves(blocks[:, 2:]), _scale(blocks)


def _q5_0(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    high = np.unpackbits(np.ascontiguousarray(blocks[:, 2:6]), axis=-1, bitorder="little")
    return _halves(blocks[:, 6:]) | high << 4, _scale(blocks)


def _q8_0(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _scale(blocks)


def _q6_k(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of 128: four runs of 32, whose low bits are in 64 bytes and high bits in 32."""
    low, high, scales = blocks[:, :128], blocks[:, 128:192], np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    low = low.reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1) & 15
    high = high.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & 3
    codes = low.reshape(-1, 256) | high.reshape(-1, 256) << 4
    whole = np.ascontiguousarray(blocks[:, 208:]).view(np.float16)
    return codes, whole.astype(np.float32) * scales.astype(np.float32)


def _mxfp4(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    return _halves(blocks[:, 1:]), blocks[:, :1]


KINDS: dict[str, tuple[Scheme, int, Callable[[Blocks], tuple[np.ndarray, np.ndarray]]]] = {
    "Q4_0": (Scheme("int4", 32), 18, _q4_0),
    "Q5_0": (Scheme("int5", 32), 22, _q5_0),
    "Q8_0": (Scheme("int8", 32), 34, _q8_0),
    "Q6_K": (Scheme("int6", 16), 210, _q6_k),
    "MXFP4": (Scheme("mxfp4"), 17, _mxfp4),
}
"""A type's name → its scheme, the bytes of a block, and codes and scales of blocks [n, bytes], each [n, …]."""


def replaced(model: nn.Module, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The model's state with codes in the place of weights, and the `quantization_config` that says so.

    model: as transformers made it of the file, float32. A weight that something else reads too, such as a head that is
    tied to the embedding, stays.
    """
    tensors = _Tensors(path)
    state, linears, expanded = dict(model.state_dict()), {}, Counter[str]()
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        kind, made = tensors.codes_of(module.weight.detach()) if owners[id(module.weight)] == 1 else ("tied", None)
        if made is None:
            expanded[kind] += 1
            continue
        del state[f"{name}.weight"]
        state |= {f"{name}.codes": made.scheme.pack(made.codes), f"{name}.scale": made.scale}
        linears[name] = {"kind": kind, "channels": module.in_features}
    return state, {"quant_method": METHOD, "linears": linears, "expanded": dict(expanded)}


class _Tensors:
    """The file's matrices, found by what a row of them expands to."""

    def __init__(self, path: Path):
        from gguf import GGUFReader

        self.tensors = {t.name: t for t in GGUFReader(path).tensors if len(t.shape) == 2}
        self.rows: dict[bytes, tuple[str, int]] = {}
        for name in self.tensors:
            for at, row in enumerate(self._expanded(name)):
                self.rows[_digest(row)] = (name, at)

    def _expanded(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

    def codes_of(self, weight: torch.Tensor) -> tuple[str, Codes | None]:
        """The type of the tensor that a weight's rows are of, and its codes if they are exactly those."""
        found = [self.rows.get(_digest(row)) for row in weight.numpy()]
        names = {one[0] for one in found if one is not None}
        name = next(iter(names), None)
        if name is None:
            return "changed by transformers", None
        kind = self.tensors[name].tensor_type.name
        if len(names) > 1 or None in found or kind not in KINDS:
            return kind, None
        scheme, size, unpack = KINDS[kind]
        rows = [one[1] for one in found if one is not None]
        blocks = np.asarray(self.tensors[name].data).reshape(-1, size)
        out, channels = weight.shape
        codes, scale = (torch.from_numpy(np.array(part)) for part in unpack(blocks))
        made = Codes(scheme, codes.reshape(-1, channels)[rows], scale.reshape(-1, channels // scheme.group)[rows])
        same = torch.equal(CodedLinear(made, None, dtype=torch.float32).weight, weight)
        return kind, made if same and made.codes.shape == (out, channels) else None


def _digest(row: np.ndarray) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def prepared(config: dict[str, Any], headers: Headers) -> dict[str, Any]:
    """The configuration, which is what `replace` needs.

    Raises:
        UserError: a linear's codes or scales are missing.
    """
    for name in config["linears"]:
        missing = next((p for p in ("codes", "scale") if f"{name}.{p}" not in headers), None)
        if missing:
            raise refused(METHOD, f"the tensor '{name}.{missing}' is missing")
    return config


def replace(model: nn.Module, read: dict[str, Any]) -> None:
    """Puts a `GgufLinear` in the place of each linear that has codes; read: what `prepared` made."""
    if read["linears"]:
        replace_linears(METHOD, model, read["linears"], GgufLinear)


class GgufLinear(StoredLinear):
    """codes, packed as `Scheme.pack` has them, and scale."""

    def __init__(self, like: nn.Linear, one: dict[str, Any]):
        super().__init__(like)
        self.scheme = KINDS[one["kind"]][0]
        element, groups = self.scheme.element, self.in_features // self.scheme.group
        width = element.packed_bytes(self.in_features)
        self.hold("codes", (self.out_features, width), element.stored if element.bits == 8 else torch.uint8)
        dtype = torch.uint8 if self.scheme.of.scaling == "e8m0" else torch.float16
        self.hold("scale", (self.out_features, groups), torch.float32 if one["kind"] == "Q6_K" else dtype)

    def finished(self, name: str) -> CodedLinear:
        codes = self.scheme.unpack(self.codes.detach(), self.in_features)
        return CodedLinear(Codes(self.scheme, codes, self.scale.detach()), self.bias, dtype=self.dtype)


def summary(read: dict[str, Any]) -> str:
    """One line: how many linears are codes, and of which types the others are."""
    others = ", ".join(f"{count} of {kind}" for kind, count in sorted(read["expanded"].items()))
    kept = f"{len(read['linears'])} linears are kept as codes"
    return f"{kept}; dequantized are {others}" if others else kept
