"""Writes one file of each form that Fuseline reads back: `python tests/formats/write.py tests/formats/written-1`.

What a release wrote is kept as it is, and read by every later one (`test_old_files.py`): a folder is written once, for
a version of the forms, and never again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fuseline
from fuseline.codegen.lower import lower
from fuseline.compiler.observe import Dump, Record

ROOT = Path(__file__).resolve().parents[2]
CODES, GPTQ = "quantize{weights=int8}", "raise,quantize{weights=int4:g8,method=gptq},fuse"


class Net(torch.nn.Module):
    """[batch, 8] → [batch, 8]; its weights are the same everywhere and at all times."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(8), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        for number, parameter in enumerate(self.parameters(), 1):
            values = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.data = torch.sin(values * 0.7 + number).float()
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


def inputs() -> torch.Tensor:
    return torch.cos(torch.arange(32, dtype=torch.float64) * 0.3).reshape(4, 8).float()


def write(folder: Path) -> None:
    x = inputs()
    fuseline.analyze(Net().eval(), GPTQ, [(x,)]).save(folder / "plan.json")
    model = fuseline.optimize(Net().eval(), CODES, target="eager")
    model(x)
    fuseline.save(model, folder / "artifact")
    program = fuseline.capture(Net().eval(), (x,))
    stages = folder / "stages"
    program, _ = fuseline.Pipeline("raise,fuse").run(program, [Dump(stages), Record(stages)])
    lower(program).write(folder / "module")
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".json"):  # lines of the code that ran, without one machine's folders
            path.write_text(path.read_text(encoding="utf-8").replace(f"{ROOT}/", ""), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
