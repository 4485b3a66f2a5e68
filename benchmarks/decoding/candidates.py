"""The candidates: how each makes its model fast, through the front door that its documentation names.

Peers of torch.compile take the model through `generate()`'s own compilation of decode steps (`compile_config`), which
compiles the step and leaves the prompt to eager; the same compiled call is timed step by step. Fuseline compiles the
model in place; `generate()` then runs it for the prompt and for the steps, with its own compilation off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fuseline

from .model import size, weight_bytes

GROUP = 128
CALLS, TOKENS = 4, 256
PIPELINES = {
    "fuseline-bf16": "raise,fuse",
    "fuseline-int4": f"raise,quantize{{weights=int4:g{GROUP}}},fuse",
    "fuseline-int8": "raise,quantize{weights=int8},fuse",
    "fuseline-fp8": "raise,quantize{weights=fp8},fuse",
}


@dataclass
class Ready:
    """A model that is ready to be called.

    call: one step, the model itself or a compiled call. generation: further arguments of `generate()`. weights: bytes
    of the weights that a step must read, once it has run. notes: what else the row should say, once it has run.
    compiled: Fuseline's last graph, once it has run; None of a peer.
    """

    model: torch.nn.Module
    call: Callable[..., Any]
    weights: Callable[[int], int]
    generation: dict[str, Any] = field(default_factory=lambda: {"disable_compile": True})
    notes: Callable[[], dict[str, Any]] = dict
    compiled: Callable[[], Any] = lambda: None


Prepare = Callable[[torch.nn.Module], Ready]


def eager(model: torch.nn.Module) -> Ready:
    return Ready(model, model, lambda batch: weight_bytes(model, batch))


def compiled(mode: str) -> Prepare:
    """torch.compile with Inductor in one of its modes."""

    def prepare(model: Any) -> Ready:
        from transformers import CompileConfig

        config = CompileConfig(mode=mode, dynamic=False)
        config._compile_all_devices = True  # on a CPU too, for trying the benchmark out
        model.generation_config.compile_config = config
        call = model.get_compiled_call(config)
        return Ready(model, call, lambda batch: weight_bytes(model, batch), generation={})

    return prepare


def torchao_int4(model: Any) -> Ready:
    """torchao's weight-only int4 in the layout of PyTorch's tinygemm kernel, under torch.compile; head left alone."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()
    config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    quantize_(model, config, filter_fn=lambda module, _: isinstance(module, torch.nn.Linear) and module is not head)
    return compiled("reduce-overhead")(model)


def ours(pipeline: str, target: str | None = None) -> Prepare:
    """Fuseline with a pipeline."""

    def prepare(model: torch.nn.Module) -> Ready:
        needs_data = fuseline.Pipeline(pipeline).needs_data
        plan = fuseline.analyze(model, pipeline, calibration(model)) if needs_data else None
        optimized = fuseline.optimize(model, pipeline, target=target, plan=plan)

        def notes() -> dict[str, Any]:
            compilations = fuseline.reports(optimized)
            through = {reason for compilation in compilations for reason in compilation.refusals.values()}
            return {
                "pipeline": pipeline,
                "graphs": len(compilations),
                "targets": sorted({compilation.target for compilation in compilations}),
                "kernels": len(compilations[-1].kernels),
                "through_pytorch": sorted(through),
            }

        return Ready(
            optimized,
            optimized,
            lambda batch: program_bytes(optimized, batch, plan),
            notes=notes,
            compiled=lambda: fuseline.reports(optimized)[-1],
        )

    return prepare


def calibration(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Random ids for passes that need data: a random model's activations are as good on those as on text."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (CALLS, 1, TOKENS), generator=draw).to(model.device)  # type: ignore[arg-type, union-attr]
    return [{"input_ids": one, "use_cache": False} for one in ids]


def program_bytes(model: Any, batch: int, plan: fuseline.Plan | None = None) -> int:
    """Bytes of the weights in the graph compiled last; of a table that is only looked up, its rows; of what sparse
    products read, the share that `plan` leaves of them for one row."""
    sparse = plan.of("rsparse") if plan is not None else {}
    total, share = 0.0, sparse[""].structure["read"] if sparse else 1.0
    for node in fuseline.reports(model)[-1].program.weights():
        value = node.meta["val"]
        looked_up = all(user.target is torch.ops.aten.embedding.default for user in node.users)
        dropped = any(name in str(user.target) for user in node.users for name in ("sparse", "dequantize") if sparse)
        total += batch * value.shape[1] * value.element_size() if looked_up else size(value) * (share if dropped else 1)
    return int(total)


def candidates(pipelines: list[str] | None = None, target: str | None = None) -> dict[str, Prepare]:
    """By name, in the order in which they run: torchao last, because it changes Inductor's settings for good."""
    more = {f"fuseline {pipeline}": ours(pipeline, target) for pipeline in pipelines or ()}
    return {
        "eager": eager,
        "reduce-overhead": compiled("reduce-overhead"),
        **{name: ours(pipeline, target) for name, pipeline in PIPELINES.items()},
        **more,
        "max-autotune": compiled("max-autotune"),
        "torchao-int4": torchao_int4,
    }
