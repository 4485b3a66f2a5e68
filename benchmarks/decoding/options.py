"""The options of everything that decodes: which model, how long a cache, how many steps."""

from __future__ import annotations

import argparse

import torch
from harness import arguments

from .loop import INPUTS, WARMUP
from .model import SHAPES, fitting


def decoding_arguments(description: str | None) -> argparse.ArgumentParser:
    parser = arguments(description)
    parser.add_argument("--model-shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="shorten the model")
    parser.add_argument("--fit", action="store_true", help="as many layers, and the dtype, as this GPU takes")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cache-length", type=int, default=1024, help="slots of the static cache (default: 1024)")
    parser.add_argument("--steps", type=int, default=64, help="steps timed at a time (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="times that the steps are timed (default: 3)")
    parser.add_argument("--inputs", choices=INPUTS, default="generate", help="what a step is given: decoding/loop.py")
    parser.add_argument("--target", help="Fuseline's target (default: auto)")
    return parser


def fit(options: argparse.Namespace) -> None:
    """Sets the layers by the GPU's memory, unless they were given, and float16 where bfloat16 is emulated."""
    if not options.fit or torch.device(options.device).type != "cuda":
        return
    facts = torch.cuda.get_device_properties(torch.device(options.device))
    options.layers = options.layers or fitting(options.model_shape, facts.total_memory)
    if torch.version.hip is None and facts.major < 8:
        options.dtype = "float16"


def prompt_length(options: argparse.Namespace) -> int:
    """Tokens before the first step: the steps then end at the cache's end, but for the warm-up's."""
    length = options.cache_length - options.steps - WARMUP
    if length < 1:
        raise SystemExit(f"error: a cache of {options.cache_length} slots holds no prompt and {options.steps} steps")
    return length
