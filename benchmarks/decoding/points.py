"""The points of `decode.py --all`, the most telling first: what each runs, how long that takes, what rows it leaves.

Each point is one process of one of three scripts. Seconds are estimates for one H200 with empty caches; `--all` begins
no point that would not end in what is left of its budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .layers import label
from .model import SHAPES

PEERS = {
    "none": (),
    "cheap": ("reduce-overhead",),
    "all": ("reduce-overhead", "max-autotune", "torchao-int4"),
}
# Seconds: a process until its first row (imports, rates, eager's reference), and the reference of other layers; then a
# candidate's fixed part and what each layer adds to its compilation.
START, AGAIN = 25, 6
COMPILE = {
    "eager": (3, 0.1),
    "fuseline-bf16": (10, 1.1),
    "fuseline-int4": (8, 0.8),
    "fuseline-int8": (8, 0.8),
    "fuseline-fp8": (8, 0.8),
    "reduce-overhead": (10, 1.4),
    "max-autotune": (30, 3.5),
    "torchao-int4": (15, 2.0),
}
FILES = {"decode.py": "points", "decode_start.py": "starts", "decode_quality.py": "quality"}
SHORT = 96  # slots of a cache where the model is a tiny one


@dataclass(frozen=True)
class Point:
    """name; says: what it shows; script: in benchmarks/; ours: candidates; peers: whether it takes any; seconds: of a
    point of decode_quality.py; devices: on which it can run; the rest: decode.py's options."""

    name: str
    says: str
    script: str = "decode.py"
    ours: tuple[str, ...] = ()
    peers: bool = True
    shape: str = "8b"
    layers: int | None = None
    batch: int = 1
    cache: int = 1024
    drawn: bool = False
    kernels: bool = False
    words: tuple[str, ...] = ()
    seconds: float = 0.0
    devices: tuple[str, ...] = ("cuda",)

    @property
    def total(self) -> int:
        return SHAPES[self.shape]["num_hidden_layers"]

    @property
    def shortened(self) -> bool:
        return self.layers is not None and self.layers < self.total

    def candidates(self, peers: str) -> tuple[str, ...]:
        """In the order in which they run: ours, what compiles quickly, and last what changes Inductor for good."""
        return (*self.ours, *(PEERS[peers] if self.peers else ()))

    def counts(self) -> tuple[int, ...]:
        """The numbers of layers that are measured: a shortened model twice, so that one layer's part is known."""
        if not self.shortened or self.layers is None:
            return (self.total,)
        return (self.layers // 2, self.layers)

    def rows(self, peers: str) -> list[str]:
        """The names of the rows that it leaves in its results file."""
        if self.script == "decode.py":
            return [label(self.name, c, n, self.total) for n in self.counts() for c in self.candidates(peers)]
        if self.script == "decode_start.py":
            named = [label(None, c, self.layers, self.total) for c in self.candidates(peers)]
            return [f"{name} {kind}" for name in named for kind in ("cold", "warm")]
        return [self.name]

    def estimate(self, peers: str) -> float:
        """Seconds that it takes on one H200."""
        each = sum(a + b * n for n in self.counts() for a, b in (COMPILE[c] for c in self.candidates(peers)))
        if self.script == "decode_start.py":  # with every second process the caches are warm
            return 2 * START * len(self.candidates(peers)) + 1.6 * each
        return self.seconds or START + AGAIN * (len(self.counts()) - 1) + each

    def command(self, peers: str) -> list[str]:
        """The script and its words, but for the device, the results file and the budget."""
        if self.script == "decode_quality.py":
            return [self.script, "--row", self.name, *self.words]
        words = [self.script, "--model-shape", self.shape, "--cache-length", str(self.cache), *self.words]
        words += ["--layers", str(self.layers)] if self.shortened else []
        words += ["--only", *self.candidates(peers)]
        if self.script == "decode_start.py":
            return words
        words += ["--point", self.name, "--batch", str(self.batch), "--no-generate"]
        words += ["--per-layer"] if self.shortened else []
        words += ["--cache", "drawn"] if self.drawn else []
        return words + (["--kernels"] if self.kernels else [])


CODED = ("fuseline-bf16", "fuseline-int4", "fuseline-int8", "fuseline-fp8")
TWO = ("fuseline-bf16", "fuseline-int4")
POINTS = (
    Point("8b-1k", "Llama-3-8B shape: bf16, int4, int8, fp8, and where each kernel stands", ours=CODED, kernels=True),
    Point("smollm2-fp32", "SmolLM2 in fp32: eager's tokens, time beside Inductor's", "decode_quality.py",
          words=("--dtype", "float32"), seconds=110, devices=("cuda", "cpu")),
    Point("smollm2-bf16", "SmolLM2 in bf16: KL to fp64 beside Inductor's", "decode_quality.py",
          words=("--dtype", "bfloat16"), seconds=110, devices=("cuda", "cpu")),
    Point("1b-1k", "Llama-3.2-1B shape in bf16", ours=("fuseline-bf16",), shape="1b"),
    Point("8b-128k", "a cache of 131072 slots", ours=("fuseline-bf16",), cache=131072, drawn=True),
    Point("8b-b16", "batch 16", ours=TWO, batch=16),
    Point("start", "seconds until the eighth token: a first process and a second one", "decode_start.py",
          ours=("fuseline-bf16",)),
    Point("8b-32k", "a cache of 32768 slots", ours=("fuseline-bf16",), cache=32768, drawn=True),
    Point("8b-b64", "batch 64", ours=TWO, batch=64),
    Point("8b-b4", "batch 4", ours=TWO, batch=4),
)  # fmt: skip


def tried(point: Point) -> Point:
    """The same of a tiny model and a short cache: tries the point out where there is no GPU."""
    small = replace(point, shape="tiny", cache=min(point.cache, SHORT), devices=("cuda", "cpu"))
    if point.script == "decode_quality.py":
        return replace(
            small,
            words=(*point.words, "--model", "demo:tiny-llama", "--tokens", "8", "--forced", "16", "--rounds", "3"),
        )
    if point.layers is not None:
        small = replace(small, layers=min(point.layers, small.total))
    return replace(small, words=("--steps", "8", "--repeats", "2") if point.script == "decode.py" else ())
