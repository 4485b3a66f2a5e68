"""Every quantization scheme on a model: perplexity, divergence, top-1, bytes, seconds; beside others' same schemes.

    pip install --no-deps torchao llmcompressor   # and what they import; without them their columns are empty
    python benchmarks/schemes.py                  # writes docs/schemes.json; `python docs/generate.py` makes the page
    python benchmarks/schemes.py --only "int4:g64 gptq order" w4a16 --tokens 4096

A row that the file has already, with the same settings and code, is not measured again. Everything is in float32, on
tokens of the half of the standard library's `pydoc_data.topics` that is not calibrated on; the head and the embedding
are left alone on all sides. Peers see the same calibration and the same held-out tokens in the same process.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import importlib.metadata
import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import torch
from compared import llm_compressor_peer, torchao_peer
from compared.ours import Ours
from compared.score import Judge, Score
from compared.settings import Setting, settings
from harness import Run, arguments, release

import fuseline
from fuseline.compiler.progress import steps
from fuseline.models import text
from fuseline.models.spec import load

RECORDS = Path(__file__).resolve().parent.parent / "docs" / "schemes.json"
PEERS = {"torchao": "torchao", "llm_compressor": "llmcompressor"}
COLUMNS = ("name", "ratio", "kl", "top1", "bits", "seconds", "torchao_ratio", "llm_compressor_ratio", "worse")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.set_defaults(json=RECORDS, resume=True, budget=7200)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, default=1024, help="held-out tokens")
    parser.add_argument("--calibration", type=int, default=2048, help="tokens to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--batch", type=int, default=2, help="windows a call")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--anew", dest="resume", action="store_false", help="measure all rows again")
    return parser.parse_args(words)


class Benchmark:
    """One model and its text."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        loaded = load(options.model)
        self.original = loaded.model.eval().to(self.device)
        cut = lambda source, tokens: self._batches(text.windows(source, loaded.encode, options.length, tokens))
        self.held_out = cut(text.evaluation_text(), options.tokens // options.length)
        self.calibration = cut(text.calibration_text(), options.calibration // options.length)
        self.judge = Judge(self._logits(self.original), self.held_out)
        self.ours = Ours(self.original, self.calibration)
        self.peers = [name for name in options.peers if importlib.util.find_spec(PEERS[name])]

    def _batches(self, windows: list[torch.Tensor]) -> list[torch.Tensor]:
        whole = len(windows) // self.options.batch * self.options.batch  # all calls have one shape
        return list(torch.cat(windows[:whole]).to(self.device).split(self.options.batch))

    def _logits(self, model: Any) -> Any:
        return lambda ids: model(input_ids=ids, use_cache=False).logits

    def key(self, setting: Setting) -> str:
        """What a row depends on: the setting, the options, and the code that rounds."""
        chosen = {k: v for k, v in vars(self.options).items() if k in ("model", "tokens", "calibration", "length")}
        return hashlib.sha256(f"{setting} {chosen} {self.peers} {code()}".encode()).hexdigest()[:16]

    def fill(self, row: dict[str, Any], setting: Setting) -> None:
        row |= {"part": setting.part, "pipeline": setting.pipeline, "key": self.key(setting)}
        score, facts, _ = self.ours.measure(setting, self.judge)
        row |= {**self._figures(score), **facts}
        others = {}
        for name in self.peers:
            if self._has(name, setting):
                row |= {f"{name}_{key}": value for key, value in self._peer(name, setting).items()}
                others[name] = row.get(f"{name}_loss", math.inf)
        if others and min(others.values()) < math.inf:
            row["worse"] = math.exp(row["loss"] - min(others.values())) - 1
        release(self.device)

    def _figures(self, score: Score) -> dict[str, Any]:
        quarters = {f"kl_{number}": part for number, part in enumerate(score.kl_by, 1)}
        ratio, kept = score.over(self.judge.loss), score.loss - self.judge.loss
        return {"loss": score.loss, "ratio": ratio, "cost": kept, "kl": score.kl, "top1": score.top1, **quarters}

    @staticmethod
    def _has(name: str, setting: Setting) -> bool:
        if name == "torchao":
            return torchao_peer.config(setting) is not None
        return llm_compressor_peer.modifiers(setting) is not None

    def _peer(self, name: str, setting: Setting) -> dict[str, Any]:
        """The figures; or what the library said where it failed, which is a finding too."""
        model, started = copy.deepcopy(self.original), time.perf_counter()
        try:
            if name == "torchao":
                torchao_peer.quantized(model, setting)
            else:
                llm_compressor_peer.quantized(model, setting, self.calibration)
            seconds = time.perf_counter() - started
            score = self.judge(self._logits(model))
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        figures = self._figures(score)
        return {key: figures[key] for key in ("loss", "ratio", "kl", "top1")} | {"seconds": seconds}


def code() -> str:
    """What tells this version of the code that rounds from others, comments and docstrings left out."""
    root = Path(fuseline.__file__).parent
    files = sorted(p for part in ("passes", "compiler/formats", "compiler/ops") for p in (root / part).rglob("*.py"))
    files = [path for path in files if path.name != "recipes.py"]  # a row has its pipeline
    files += [root / "compiler" / name for name in ("schemes.py", "clipping.py", "half_quadratic.py", "expressions.py")]
    return hashlib.sha256("".join(map(statements, files)).encode()).hexdigest()[:12]


def statements(path: Path) -> str:
    """A file's syntax tree."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    return ast.dump(tree)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    known = settings()
    run = Run("schemes", options, floors=False)
    run.check(tuple(known))
    benchmark = Benchmark(options)
    run.record |= {"loss": benchmark.judge.loss, "perplexity": math.exp(benchmark.judge.loss)}
    run.record["options"].pop("json")  # a machine's own path
    run.record["environment"]["peers"] = {name: version(module) for name, module in PEERS.items()}
    current = {name: benchmark.key(setting) for name, setting in known.items()}
    stale = lambda row: run.wanted(row["name"]) and row.get("key") != current.get(row["name"])
    run.rows[:] = [row for row in run.rows if row["name"] in known and not stale(row)]
    for name, setting in steps(known.items(), "measuring schemes", total=len(known)):
        run.measure(name, lambda row, setting=setting: benchmark.fill(row, setting))
    order = list(known)
    run.rows.sort(key=lambda row: order.index(row["name"]))
    run.save()
    run.table(COLUMNS)


def version(module: str) -> str | None:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
