"""Quantization-aware training: weights of 2 bits, trained with the rounding in the graph, then codes.

python examples/qat.py              a decoder of one layer learns a text of 64 tokens, in seconds
"""

from __future__ import annotations

import argparse

import torch

import fuseline
from fuseline.models.decoder import TinyDecoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="raise,quantize{weights=midrise2,method=paretoq}")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()

    torch.manual_seed(0)
    model, ids = TinyDecoder(vocabulary=64, hidden=32, layers=1), torch.arange(64).view(2, 32)
    qat = fuseline.prepare_qat(model, given.pipeline, (ids,))
    optimizer = torch.optim.AdamW(qat.parameters(), 3e-3, weight_decay=0.0)
    losses = []
    for _ in range(given.steps):
        loss = torch.nn.functional.cross_entropy(qat(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    qat.eval()
    with torch.no_grad():
        trained = qat(ids)
        converted = fuseline.convert(qat)
        gap = (converted(ids) - trained).abs().max().item()
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}; the codes compute what training saw, to {gap:.0e}")
    (compilation,) = fuseline.reports(converted)
    before, after = compilation.captured.weight_bytes(), compilation.program.weight_bytes()
    print(f"weights {before} → {after} bytes")


if __name__ == "__main__":
    main()
