"""Memory and time of a training step at long contexts on one GPU: Inductor alone, and behind Fuseline's exact passes.

    python benchmarks/long_context.py --json long_context.json
    python benchmarks/long_context.py --device cpu --tiny

A random Hugging Face decoder of Llama-3.2-1B's shape in bfloat16, batch 1, forward and backward through
`model(ids, labels=ids).loss.backward()`, no optimizer. Each row is a process of its own:

    inductor   torch.compile(model)
    passes     torch.compile(model, backend="fuseline", options={"recompute": False}): the mask proved causal (`raise`),
               the head fused with the loss (`fuse-loss`), the rest Inductor's with its own choice of what is saved
    fuseline   torch.compile(model, backend="fuseline"): pointwise factors of products made again in backward, too

Peak is the largest memory that PyTorch's allocator handed out during the timed steps, parameters and gradients
included. As many processes as the GPU's memory holds compile at once, and each is alone on it while it is timed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import Run, arguments

COLUMNS = (
    "name",
    "peak_gb",
    "step_s",
    "of_inductor_memory",
    "speedup",
    "tokens_s",
    "compile_s",
    "loss",
    "gradient_norm",
)
LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    "max_position_embeddings": 131072, "rope_theta": 500000.0,
}  # fmt: skip
TINY = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
BACKENDS = ("inductor", "passes", "fuseline")
BYTES_A_TOKEN = {"inductor": 2.4e6, "passes": 1.6e6, "fuseline": 1.2e6}  # about, to see which processes fit together
RESULT = "result: "
ERROR = re.compile(r"(torch\.)?\w*Error: ")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a sequence (default: 8192 32768)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: 5)")
    parser.add_argument("--pipeline", help="of the fuseline rows (default: the backend's own)")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, to try the script out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # a row, as BACKEND:LENGTH
    options = parser.parse_args(words)
    options.lengths = options.lengths or ([64, 256] if options.tiny else [8192, 32768])
    return options


class Worker:
    """One row in a process of its own: it compiles, says so, waits for its turn, and times its steps."""

    def __init__(self, options: argparse.Namespace):
        backend, length = options.worker.split(":")
        self.device, self.steps = torch.device(options.device), options.steps
        self.model = build(TINY if options.tiny else LLAMA_1B, self.device)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        self.ids = torch.randint(0, vocabulary, (1, int(length)), generator=generator).to(self.device)
        settings: dict[str, Any] = {"pipeline": options.pipeline} if options.pipeline else {}
        if self.device.type != "cuda":
            settings["target"] = "inductor"
        if backend == "passes":
            settings["recompute"] = False
        if backend == "inductor":
            self.compiled = torch.compile(self.model)
        else:
            self.compiled = torch.compile(self.model, backend="fuseline", options=settings)

    def step(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        loss: torch.Tensor = self.compiled(self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        self.step()
        self.synchronize()
        row: dict[str, Any] = {"compile_s": time.perf_counter() - began}
        self.model.zero_grad(set_to_none=True)
        self.rest()
        print("ready", flush=True)
        sys.stdin.readline()  # until the others rest
        self.step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.steps):
            self.synchronize()
            start = time.perf_counter()
            loss = self.step()
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        seconds.sort()
        row |= {"step_s": seconds[len(seconds) // 2], "step_s_spread": [seconds[0], seconds[-1]], "loss": loss.item()}
        if self.device.type == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        else:
            row["peak_gb"] = resident()
        row["tokens_s"] = self.ids.numel() / row["step_s"]
        norms = [p.grad.float().norm() for p in self.model.parameters() if p.grad is not None]
        row["gradient_norm"] = torch.stack(norms).norm().item()
        return row

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def rest(self) -> None:
        """Gives back what the next step will ask for again, so that a neighbour can have it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def resident() -> float:
    """The largest resident memory of this process in GB: on a CPU there is no allocator to ask."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def build(shape: dict[str, Any], device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).train()


class Process:
    """A worker seen from the script."""

    def __init__(self, backend: str, length: int, words: list[str]):
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", f"{backend}:{length}", *words]
        self.name, pipe = f"{backend} {length}", subprocess.PIPE
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by stop()
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.said, text=True)

    def ready(self) -> None:
        """Waits until it has compiled."""
        self._until("ready")

    def result(self) -> dict[str, Any]:
        """Its row, from the moment that it has the GPU for itself."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self._until(RESULT)
        self.process.wait()
        found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
        return found

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.said.close()

    def _until(self, start: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        self.process.wait()
        self.said.seek(0)
        said = [line.strip() for line in self.said if line.strip()]
        errors = [line for line in said if ERROR.match(line)] or said
        raise RuntimeError(errors[-1] if errors else f"the process of {self.name} ended without a word")


def rounds(rows: list[tuple[str, int]], memory: float) -> list[list[tuple[str, int]]]:
    """Rows that compile at once: as many as fit into the memory together, the largest first."""
    size = lambda row: BYTES_A_TOKEN[row[0]] * row[1]
    found: list[list[tuple[str, int]]] = []
    for row in sorted(rows, key=size, reverse=True):
        home = next((one for one in found if sum(map(size, [*one, row])) <= memory), None)
        if home is None:
            found.append([row])
        else:
            home.append(row)
    return found


def compare(row: dict[str, Any], measured: dict[str, dict[str, Any]], length: int) -> None:
    """Against Inductor alone at the same length, where that was measured."""
    peer = measured.get(f"inductor {length}")
    if peer is not None and peer is not row and "step_s" in peer and "step_s" in row:
        row["of_inductor_memory"], row["speedup"] = row["peak_gb"] / peer["peak_gb"], peer["step_s"] / row["step_s"]


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    if options.worker:
        print(RESULT + json.dumps(Worker(options).run()), flush=True)
        return
    run = Run("long-context", options, floors=False)
    rows = [(backend, length) for length in options.lengths for backend in BACKENDS]
    names = {(backend, length): f"{backend} {length}" for backend, length in rows}
    run.check(list(names.values()))
    passed = ["--device", options.device, "--steps", str(options.steps), *(["--tiny"] if options.tiny else [])]
    passed += ["--pipeline", options.pipeline] if options.pipeline else []
    there = {row["name"] for row in run.rows}
    failures: dict[str, BaseException] = {}
    memory = 0.9 * run.record["environment"].get("gpu_memory", 1e18)
    for together in rounds([row for row in rows if run.wanted(names[row]) and names[row] not in there], memory):
        processes = [Process(*row, passed) for row in together]
        try:
            for process in processes:
                run.console.print(f"{process.name}: compiling", highlight=False)
            for process in processes:
                try:
                    process.ready()
                except RuntimeError as error:
                    failures[process.name] = error
            for process in processes:
                run.measure(process.name, lambda row, one=process: fill(row, one, failures))
        finally:
            for process in processes:
                process.stop()
    measured = {row["name"]: row for row in run.rows}
    for backend, length in rows:
        if backend != "inductor" and f"{backend} {length}" in measured:
            compare(measured[f"{backend} {length}"], measured, length)
    run.rows.sort(key=lambda row: list(names.values()).index(row["name"]))
    run.save()
    run.table(COLUMNS)


def fill(row: dict[str, Any], process: Process, failures: dict[str, BaseException]) -> None:
    if process.name in failures:
        raise failures[process.name]
    row |= process.result()


if __name__ == "__main__":
    main()
