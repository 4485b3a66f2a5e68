"""Compress a Hugging Face model, save it, and serve it from the artifact: other processes never see the original.

python examples/compress_and_serve.py                               a random model of two layers, in seconds
python examples/compress_and_serve.py --model hf:DIR --recipe w8a8  a checkpoint of yours
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import fuseline
from fuseline.models import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:tiny-llama", help="a model of `fuseline run` that can generate()")
    parser.add_argument("--recipe", default="raise,quantize{weights=int8},fuse", help="a recipe or a pipeline")
    parser.add_argument("--output", help="where the artifact goes; a temporary folder when left out")
    given = parser.parse_args()

    loaded = load(given.model)
    ids = torch.tensor([loaded.encode("A compiler is a program that")])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = Path(given.output or scratch) / "artifact"
        model = fuseline.optimize(loaded.model, given.recipe, keep_originals=False)
        expected = model.generate(ids, **settings)
        fuseline.save(model, folder)
        size = sum(path.stat().st_size for path in folder.iterdir())

        served = fuseline.load(folder)  # what a server does when it starts
        answer = served.generate(ids, **settings)
        print(f"artifact of {size / 1e6:.1f} MB; the same tokens: {torch.equal(answer, expected)}")
        print(repr(loaded.decode(answer[0].tolist())))


if __name__ == "__main__":
    main()
