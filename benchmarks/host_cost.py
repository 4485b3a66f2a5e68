"""What a decode step costs the host: the time of our Python beside the launch of the captured graph.

    python benchmarks/host_cost.py                                the Llama-3-8B shape on one GPU
    python benchmarks/host_cost.py --model-shape tiny --device cpu --cache-length 128 --steps 16      tries it out

Medians over steps that are issued one after another while the GPU lags behind, without a profiler, which would cost
more than what is measured. Columns, in microseconds:

step_us        the model's call, from the user's side
wrapper_us     of that, outside our executable: Dynamo's guards, the model's own forward wrappers, the output's class
executable_us  our executable: inputs, weights, replay, results
launch_us      of that, the replay of the captured graph: cudaGraphLaunch
python_us      executable_us - launch_us: what we add to the launch. At most 60 is asked for.
checks         what compares addresses and versions before each replay, and copies the results after it:
               runtime/watch.cpp and results.cpp ("C++"), or what does it on machines without a C++ compiler
               ("Python"), which the rows ending in -loops run for comparison
stages         python_us by stage, measured apart, with timers around each, which add about a third of a microsecond
               a call: the checks, copies into the capture's inputs and out of its results, and the rest. What only
               a call of another kind needs must be 0: finding the weights, the capture's key.

Without a GPU nothing is captured: launch_us is then the time of the graph itself.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any
from unittest import mock

import torch
from decoding.candidates import PIPELINES, ours
from decoding.loop import Loop
from decoding.model import build, prompted
from decoding.options import decoding_arguments, prompt_length
from harness import Run, synchronize
from harness.stages import Stages

import fuseline
from fuseline.compiler.binder import Binder
from fuseline.runtime import graphs, native
from fuseline.runtime.graphs import CudaGraphs

COLUMNS = ("name", "step_us", "wrapper_us", "executable_us", "launch_us", "python_us", "captured", "checks")
LOOPS = "-loops"
SHOWN = {name: PIPELINES[name] for name in ("fuseline-bf16", "fuseline-int4")}
ROWS = SHOWN | {name + LOOPS: pipeline for name, pipeline in SHOWN.items()}
ASKED = 60.0  # microseconds of Python beyond the launch


class Profile:
    """The host's time of one optimized model's steps, in two parts: the total, and again by stage."""

    def __init__(self, options: argparse.Namespace, device: torch.device, pipeline: str):
        self.options, self.device = options, device
        model = build(options.model_shape, options.layers, device, getattr(torch, options.dtype))
        self.state = prompted(model, options.batch, prompt_length(options), options.cache_length, device)
        self.model: Any = ours(pipeline, options.target)(model).call
        self.loops: list[Loop] = []
        self.loop().warm_up()

    def loop(self) -> Loop:
        """On a cache of its own, so that what it captures calls the timers of the moment.

        Loops are kept: the cache of one that is gone would leave its addresses, and its capture, to the next.
        """
        options = self.options
        self.loops.append(Loop(self.model, self.model, self.state, options.cache_length, options.inputs))
        return self.loops[-1]

    def executable(self) -> Any:
        return fuseline.reports(self.model)[-1].executable

    def launch(self) -> tuple[Any, str]:
        return (torch.cuda.CUDAGraph, "replay") if self.device.type == "cuda" else (self.executable(), "run")

    @torch.no_grad()
    def measure(self, functions: dict[str, tuple[Any, str]]) -> Stages:
        watched = Stages(functions)
        with watched.watching():
            loop = self.loop()
            loop.warm_up()
            for _ in range(self.options.repeats):
                loop.restart()
                synchronize(self.device)
                for _ in range(self.options.steps):
                    watched.step(lambda: loop.call(**loop.inputs))
        return watched

    def fill(self, row: dict[str, Any]) -> None:
        total = self.measure({"executable": (type(self.executable()), "__call__"), "launch": self.launch()})
        medians = total.medians()
        row |= {f"{label}_us": medians[label] for label in ("step", "executable", "launch")}
        row["wrapper_us"] = total.difference("step", "executable")
        row["python_us"] = total.difference("executable", "launch")
        row["asked_us"] = ASKED
        row["captured"] = self.device.type == "cuda" and medians["launch"] > 0
        if self.device.type == "cuda" and not row["captured"]:
            found = self.executable().graphs
            raise RuntimeError(f"no step was captured: {found.refusal if found else 'this target captures nothing'}")
        row["checks"] = "C++" if native.module("watch") and native.module("results") else "Python"
        row["stages"] = self.stages()

    def stages(self) -> dict[str, float]:
        """Microseconds of each stage of the executable, and what is left."""
        binder = "bound_to" if self.device.type == "cuda" else "__call__"
        functions: dict[str, tuple[Any, str]] = {
            "executable": (type(self.executable()), "__call__"),
            "weights": (Binder, binder),
            "key": (CudaGraphs, "_key"),
            "checks": (CudaGraphs, "_fits"),
            "copies in": (torch, "_foreach_copy_"),
            "copies out": (graphs, "_results"),
            "launch": self.launch(),
        }
        medians = self.measure(functions).medians()
        del medians["step"]
        return medians | {"rest": 2 * medians["executable"] - sum(medians.values())}


def main() -> None:
    options = decoding_arguments(__doc__).parse_args()
    run = Run("host-cost", options, floors=False)
    run.check(ROWS)
    for name, pipeline in ROWS.items():
        with mock.patch.object(native, "module", lambda _: None) if name.endswith(LOOPS) else contextlib.nullcontext():
            row = run.measure(name, lambda row, pipeline=pipeline: Profile(options, run.device, pipeline).fill(row))
        if row and "stages" in row:
            run.console.print({stage: round(us, 1) for stage, us in row["stages"].items()})
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
