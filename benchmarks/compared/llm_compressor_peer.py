"""The same setting through llm-compressor's `oneshot`, where it has one, calibrated on the same batches."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from fuseline.compiler.formats import Float
from fuseline.compiler.schemes import Scheme
from fuseline.passes.calibrated import Method

from .settings import Setting

METHODS = (Method.RTN, Method.GPTQ, Method.AWQ, Method.SMOOTH)
PRESETS = {"mxfp4": "MXFP4", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}


def modifiers(setting: Setting) -> list[Any] | None:
    """llm-compressor's recipe of the setting; None where it has none."""
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    weights, activations = setting.weights, setting.activations
    if not setting.plain or setting.method not in METHODS or weights is None:
        return None
    if weights.of.group:
        same = activations is None or activations.format == weights.format
        name = PRESETS.get(weights.format) if same and not weights.mse else None
        scheme = None if name is None else {"scheme": name + ("" if activations else "A16"), "targets": ["Linear"]}
    else:
        made = arguments(weights), activations and arguments(activations, run=True)
        if made[0] is None or (activations is not None and made[1] is None):
            return None
        group = QuantizationScheme(targets=["Linear"], weights=made[0], input_activations=made[1])
        scheme = {"config_groups": {"group_0": group}}
    if scheme is None:
        return None
    choices: dict[str, Any] = {**scheme, "ignore": ["lm_head"]}
    if setting.method is Method.GPTQ:
        return [GPTQModifier(**choices, actorder="static" if setting.step.order else None)]
    if setting.method is Method.AWQ:
        return [AWQModifier(**choices)]
    if setting.method is Method.SMOOTH:
        return [SmoothQuantModifier(smoothing_strength=setting.step.alpha), QuantizationModifier(**choices)]
    return [QuantizationModifier(**choices)]


def arguments(scheme: Scheme, run: bool = False) -> Any:
    """A scheme as compressed-tensors writes it; None where it cannot. run: of activations."""
    from compressed_tensors.quantization import QuantizationArgs

    if isinstance(scheme.element, Float):
        if scheme.format != "e4m3":
            return None
    elif scheme.format in ("ternary", "binary"):
        return None
    if scheme.rows > 1:
        return None
    kind = "float" if isinstance(scheme.element, Float) else "int"
    strategy = "group" if scheme.group else "tensor" if scheme.rows == 0 else "token" if run else "channel"
    return QuantizationArgs(
        num_bits=scheme.bits,
        type=kind,
        symmetric=scheme.symmetric,
        strategy=strategy,
        group_size=scheme.group if strategy == "group" else None,
        dynamic=run and not scheme.static,
        observer="mse" if scheme.mse else None if run and not scheme.static else "minmax",
    )


def quantized(model: torch.nn.Module, setting: Setting, batches: Sequence[torch.Tensor]) -> torch.nn.Module:
    """The model itself; its own `oneshot` with its own defaults otherwise."""
    from llmcompressor import oneshot
    from loguru import logger

    logger.disable("llmcompressor")
    if not Path(model.config._name_or_path or "?").is_dir():  # it reads the configuration again, from a folder
        model.config._name_or_path = tempfile.mkdtemp()
        model.config.save_pretrained(model.config._name_or_path)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for batch in batches for ids in batch.split(1)]
    oneshot(
        model=model,
        dataset=DataLoader(rows, batch_size=None),
        processor=object(),  # the rows are tokens already: nothing is asked of it
        recipe=modifiers(setting),
        num_calibration_samples=len(rows),
        max_seq_length=int(rows[0]["input_ids"].shape[1]),
    )
    return model
