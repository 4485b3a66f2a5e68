"""A setting through Fuseline: what it takes and what it makes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

import fuseline
from fuseline.calibrate import analyze_program
from fuseline.compiler.plan import Plan
from fuseline.compiler.program import Program

from .score import Judge, Score
from .settings import Setting


class Ours:
    """The model, captured once, with its norms and attentions recognised.

    batches: ids [B, T] to calibrate on, of the shape of those that are measured.
    """

    def __init__(self, model: torch.nn.Module, batches: Sequence[torch.Tensor]):
        self.calls = [((), {"input_ids": ids, "use_cache": False}) for ids in batches]
        with torch.no_grad():
            captured = fuseline.capture(model, *self.calls[0])
        self.program, _ = fuseline.Pipeline("raise").run(captured)

    def measure(self, setting: Setting, judge: Judge) -> tuple[Score, dict[str, Any], Plan | None]:
        """The score; seconds to quantize, calibration included, and how many bytes the products' weights take; what was
        decided from data."""
        pipeline = fuseline.Pipeline(setting.pipeline)
        started = time.perf_counter()
        plan = analyze_program(self.program, pipeline, self.calls) if pipeline.needs_data else None
        after, _ = pipeline.run(self.program, plan=plan)
        module, spent = after.to_module(), []

        def logits(ids: torch.Tensor) -> torch.Tensor:
            began = time.perf_counter()
            made: torch.Tensor = module(input_ids=ids, use_cache=False).logits
            spent.append(time.perf_counter() - began)
            return made

        quantized = time.perf_counter() - started
        score = judge(logits)
        codes = max(0.0, spent[0] - min(spent[1:], default=spent[0]))  # weights are rounded when they are first read
        facts: dict[str, Any] = {"seconds": quantized + codes}
        if setting.weights is not None:
            facts |= self._bytes(after)
        return score, facts, plan

    def _bytes(self, after: Program) -> dict[str, float]:
        """Of the codes, scales and zero points, and of the same weights in bf16."""
        count, held = 0, 0
        for node in after.weights():
            expression, value = node.meta["weight"], node.meta["val"]
            kinds = {type(part).__name__ for part in expression.walk()}
            if "Output" not in kinds:
                continue
            held += value.numel() * value.element_size()
            if "Pack" in kinds:
                name = expression.parameters()[0]
                count += after.sources[name].tensor.numel()
        return {"mb": held / 1e6, "to_bf16": held / (2 * count), "bits": 8 * held / count}
