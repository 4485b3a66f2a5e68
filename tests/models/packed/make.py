"""Writes the tensors beside it with the packers of AutoGPTQ 0.7.1, GPTQModel 7.7.0 and AutoAWQ 0.2.9.

    pip download --no-deps auto-gptq==0.7.1 gptqmodel==7.7.0 autoawq==0.2.9
    python tests/models/packed/make.py AUTO_GPTQ GPTQMODEL AUTOAWQ        the unpacked archives

Only the modules that pack are run, without the packages' own imports, which ask for kernels. Each case has the tensors
as they are written, and `weight`, what they were packed from.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

OUT, CHANNELS, GROUP = 32, 64, 16


def module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def parts(bits: int, index: torch.Tensor) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A linear whose weight is on the grid, its scales and zero points [out, groups]."""
    codes = torch.randint(0, 2**bits, (OUT, CHANNELS))
    zeros = torch.randint(1, 2**bits, (OUT, CHANNELS // GROUP))
    scales = (torch.rand(OUT, CHANNELS // GROUP) + 0.5).half() / 16
    linear = torch.nn.Linear(CHANNELS, OUT, bias=False)
    linear.weight.data = (codes - zeros[:, index]) * scales.float()[:, index]
    return linear, scales.float(), zeros.float()


def main(auto_gptq: Path, gptqmodel: Path, autoawq: Path) -> None:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    packer = module("qlinear_cuda", auto_gptq / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    for bits in (2, 3, 4, 8):
        index = (torch.randperm(CHANNELS) // GROUP).to(torch.int32)
        linear, scales, zeros = parts(bits, index.long())
        packed = packer.QuantLinear(bits, GROUP, CHANNELS, OUT, False)
        packed.pack(linear, scales, zeros, index)
        written = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        written["scales"] = written["scales"].half()
        tensors |= {f"gptq{bits}.{n}": t.contiguous() for n, t in (written | {"weight": linear.weight.data}).items()}
    packer = module("planar_packing", gptqmodel / "gptqmodel/utils/planar_packing.py")
    for bits in (3, 6):
        index = (torch.randperm(CHANNELS) // GROUP).to(torch.int32)
        linear, scales, zeros = parts(bits, index.long())
        codes = (linear.weight.data / scales[:, index.long()] + zeros[:, index.long()]).round().long()
        tensors |= {
            f"gptq_p{bits}.qweight": packer.planar_pack_rows(codes.t().contiguous(), bits).to(torch.int32),
            f"gptq_p{bits}.qzeros": packer.planar_pack_cols(zeros.t().contiguous().long(), bits).to(torch.int32),
            f"gptq_p{bits}.scales": scales.t().half().contiguous(),
            f"gptq_p{bits}.g_idx": index,
            f"gptq_p{bits}.weight": linear.weight.data,
        }
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(autoawq / name.replace(".", "/"))]  # type: ignore[attr-defined]
    gemm = module("awq.modules.linear.gemm", autoawq / "awq/modules/linear/gemm.py")
    index = torch.arange(CHANNELS) // GROUP
    linear, scales, zeros = parts(4, index)
    packed = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP, False, scales.t().contiguous(), zeros.t().contiguous())
    written = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    tensors |= {f"awq4.{n}": t.contiguous() for n, t in (written | {"weight": linear.weight.data}).items()}
    save_file(tensors, Path(__file__).parent / "packed.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
