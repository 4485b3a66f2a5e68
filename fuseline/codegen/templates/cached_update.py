"""What a step adds to a cache of codes: the kernel and the launch of one `fuseline::cache_write` in a region."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler.cached import CacheScheme
from ...compiler.traits import arguments
from ..about import about
from ..dtypes import pointer_type
from ..kernel import BufferUse, Kernel, Refusal
from ..kernel_text import call
from .cached_write import CONSTANTS, Write, write_kernel
from .text import Text


@dataclass(frozen=True)
class Update:
    """One write: its node's arguments, its kernel, and what that is specialised for."""

    given: dict[str, Any]
    kernel: Kernel
    shape: Write

    @property
    def wishes(self) -> dict[str, Any]:
        """Names for the arguments: `k_…` and `v_…`, as `cache_attention` calls them."""
        side = "v" if self.shape.values else "k"
        return {("before" if name == "length" else f"{side}_{name}"): a for name, a in self.given.items()}

    def write(self, text: Text, value: Callable[[Any], str]) -> None:
        """The launches. The cache is written in place, so it has to be contiguous, as `QuantizedCache` makes it."""
        given, shape = self.given, self.shape
        x, codes, recent = (value(given[name]) for name in ("x", "codes", "recent"))
        blocks = f"{codes}.shape[2]" if shape.values else f"{codes}.shape[2] // {shape.block}"
        placed = [value(given[name]) for name in shape.tensors if name not in ("x", "length")]
        with text.block(f"if {x}.numel() and not ({' and '.join(f'{p}.is_contiguous()' for p in placed)}):"):
            text.add('raise ValueError("a cache of codes is written in place: its tensors must be contiguous")')
        known = {f"{name}_ptr": value(given[name]) for name in shape.tensors}
        known |= {f"x_s{i}": f"{x}.stride({i})" for i in range(4)}
        known |= {"heads": f"{x}.shape[1]", "S": f"{x}.shape[2]", "blocks": blocks}
        grid = f"{x}.shape[0]{'' if shape.mean else f' * {x}.shape[1]'}, triton.cdiv({x}.shape[2], {shape.block})"
        with text.block(f"if {x}.numel():"), text.block(f"with torch.cuda.device_of({x}):"):
            with text.block(f"if {x}.shape[2] == 1:"):
                launch(text, self.kernel, grid, known | dict.fromkeys(CONSTANTS, "True"))
            with text.block("else:  # rows of the ring are read before they are overwritten"):
                for now in CONSTANTS:
                    launch(text, self.kernel, grid, known | {c: str(c == now) for c in CONSTANTS})


def analyse_write(node: Node, name: str) -> Update | Refusal:
    """The kernel of one write, or why there is none."""
    given = arguments(node)
    x, recent, scale = (given[part].meta["val"] for part in ("x", "recent", "scale"))
    if not x.dtype == recent.dtype == scale.dtype or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Refusal(f"a cache of {recent.dtype} for {x.dtype}: kernels take float32, float16 or bfloat16")
    if not isinstance(x.shape[3], int) or not isinstance(recent.shape[2], int):
        return Refusal("a symbolic size of heads or of the ring")
    scheme = CacheScheme.parse(given["scheme"])
    shape = Write(
        x.shape[3], scheme, given["mean"] is not None, given["block"], recent.shape[2], given["values"], scale.dtype
    )
    reason = shape.refuse()
    if reason:
        return Refusal(reason)
    source, parameters = write_kernel(name, shape)
    dtypes = {f"{a}_ptr": pointer_type(given[a].meta["val"].dtype) for a in shape.tensors}
    access = lambda a: "read" if a in ("x", "length") else "write"
    kernel = Kernel(
        name,
        source,
        {a: "constexpr" if a in CONSTANTS else dtypes.get(a, "i32") for a in parameters},
        dict.fromkeys(CONSTANTS, True),
        *about([node]),
        shape.warps,
        1,
        tuple(BufferUse(f"{a}_ptr", given[a].name, access(a)) for a in shape.tensors),
    )
    return Update(given, kernel, shape)


def launch(text: Text, kernel: Kernel, grid: str, known: Mapping[str, str]) -> None:
    """`kernel[grid](…)`; a constant that is not in `known` has the value that the kernel gives it."""
    values = [
        f"{p}={known.get(p, kernel.constants[p])}" if p in kernel.constants else known[p] for p in kernel.signature
    ]
    values += [f"num_warps={kernel.num_warps}", f"num_stages={kernel.num_stages}"]
    text.add(*call(f"{kernel.name}[({grid})](", values, ")"))
