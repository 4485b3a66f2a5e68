"""One process that compiles a model into the cache: `python cache_worker.py {offline,interpreted} [START] [DIE_AT]`.

Prints one line of JSON. START is a file that it waits for, once START-<its pid> says that it is ready. With DIE_AT it
is killed by SIGKILL at that many of its renames into the cache, each of which is half of what it writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import fuseline
from fuseline.backend import recent
from fuseline.codegen.lower import lower
from fuseline.codegen.offline import compile_kernel
from fuseline.runtime.kernel_store import KernelStore
from fuseline.runtime.location import cache_root
from tests.helpers.models import Mlp, error

PIPELINE = "raise,quantize{weights=int8},fuse"


def die_at(count: int) -> None:
    """SIGKILL in the place of the `count`-th rename below the cache's folder."""
    left = [count]

    def dying(real):
        def rename(source, target, **options):
            left[0] -= str(target).startswith(str(cache_root()))
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(source, target, **options)

        return rename

    os.rename, os.replace = dying(os.rename), dying(os.replace)


def instructions(ptx: str) -> list[str]:
    lines = (line.partition("//")[0].strip() for line in ptx.splitlines())
    return [line for line in lines if line.endswith(";") and not line.startswith(".")]


def offline() -> dict[str, object]:
    """Compiles the model's kernels for sm_90."""
    with torch.no_grad():
        program = fuseline.capture(Mlp(64, 96), (torch.randn(4, 64),))
    program, _ = fuseline.Pipeline(PIPELINE).run(program)
    store = KernelStore()
    compiled = [compile_kernel(kernel, "sm_90", store) for kernel in lower(program).kernels]
    return {
        "kernels": {c.kernel.name: instructions(c.asm["ptx"]) for c in compiled},
        "stored": sum(c.stored for c in compiled),
    }


def interpreted() -> dict[str, object]:
    """Compiles the model through torch.compile and runs it in Triton's interpreter."""
    torch.manual_seed(0)
    model, x = Mlp(64, 96).eval(), torch.randn(3, 64)
    compiled = torch.compile(model, backend="fuseline", options={"pipeline": "raise,fuse", "target": "triton"})
    with torch.no_grad():
        return {"error": error(compiled(x), model(x)), "target": recent[-1].target, "path": str(recent[-1].path)}


if __name__ == "__main__":
    mode, start, count = [*sys.argv[1:], *("", "0")[len(sys.argv) - 2 :]]
    if start:
        Path(f"{start}-{os.getpid()}").touch()  # imports are done
    while start and not Path(start).exists():
        time.sleep(0.01)
    if int(count):
        die_at(int(count))
    print(json.dumps({"offline": offline, "interpreted": interpreted}[mode]()))
