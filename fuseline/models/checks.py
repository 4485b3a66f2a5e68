"""Weights that would make every later number meaningless are refused here, by name."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import torch
from torch import nn

from fuseline.compiler.errors import UserError
from fuseline.models.coded import CodedLinear

MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit, in bytes


def require(package: str, purpose: str) -> None:
    """Raises a UserError with the line to type if `package` (one of the extra `hf`) isn't installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{purpose} needs the package {package!r}", remedy="pip install 'fuseline[hf]'")


def check_safetensors(path: Path) -> None:
    """Compares the file's size with what its header promises; reads the header only."""
    size = path.stat().st_size
    bad = f"{path} is not a complete safetensors file"
    remedy = "copy or download the file again"
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 0 or length > MAX_SAFETENSORS_HEADER:
            raise UserError(bad, [f"its first 8 bytes are no header length ({size} bytes in all)"], remedy)
        text = file.read(length)
    if len(text) < length:
        raise UserError(bad, [f"it is truncated: the header has {length} bytes, the file {size}"], remedy)
    try:
        entries = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(bad, [f"its header is corrupt: {error}"], remedy) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise UserError(bad, [f"it is {state}: the header promises {expected} bytes, the file has {size}"], remedy)


def check_weights(model: nn.Module, source: str) -> None:
    """Refuses parameters, and scales and floating-point codes, with NaN or infinite values."""
    bad = []
    coded = [(path, module) for path, module in model.named_modules() if isinstance(module, CodedLinear)]
    scales = [(f"{path}.{name}", tensor) for path, module in coded for name, tensor in module.named_buffers()]
    for name, tensor in (*model.named_parameters(), *scales):
        if not tensor.is_floating_point():
            continue
        values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
        if not torch.isfinite(values).all():
            nan, infinite = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
            bad.append(f"{name} {list(tensor.shape)}: {nan} NaN, {infinite} infinite of {tensor.numel()}")
    if bad:
        more = [f"… and {len(bad) - 5} more"] if len(bad) > 5 else []
        raise UserError(
            f"{source} has weights that are not finite: {bad[0].split(' ')[0]}",
            [*bad[:5], *more],
            "a checkpoint without them; nothing computed from these weights would mean anything",
        )
