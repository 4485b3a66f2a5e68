"""The options of everything that decodes: which model, how long a cache, how many steps."""

from __future__ import annotations

import argparse

from harness import arguments

from .loop import INPUTS, WARMUP
from .model import SHAPES


def decoding_arguments(description: str | None) -> argparse.ArgumentParser:
    parser = arguments(description)
    parser.add_argument("--model-shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="shorten the model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cache-length", type=int, default=1024, help="slots of the static cache (default: 1024)")
    parser.add_argument("--steps", type=int, default=64, help="steps timed at a time (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="times that the steps are timed (default: 3)")
    parser.add_argument("--inputs", choices=INPUTS, default="generate", help="what a step is given: decoding/loop.py")
    parser.add_argument("--target", help="Fuseline's target (default: auto)")
    return parser


def prompt_length(options: argparse.Namespace) -> int:
    """Tokens before the first step: the steps then end at the cache's end, but for the warm-up's."""
    length = options.cache_length - options.steps - WARMUP
    if length < 1:
        raise SystemExit(f"error: a cache of {options.cache_length} slots holds no prompt and {options.steps} steps")
    return length
