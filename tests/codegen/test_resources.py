"""Registers, spills, shared memory and code size, read from binaries: held to what the vendors' own tools say."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton import knobs

from fuseline.codegen import elf
from fuseline.codegen.kernel import Kernel
from fuseline.codegen.offline import TARGETS, Compiled, compile_kernel
from fuseline.codegen.resources import Resources, resources
from fuseline.runtime.cache import Cache
from fuseline.runtime.kernel_store import KernelStore


def kernel(name: str, body: str, num_warps: int = 4, num_stages: int = 2) -> Kernel:
    source = f"@triton.jit\ndef {name}(x_ptr, y_ptr, B: tl.constexpr):\n    k = tl.arange(0, B)\n{body}"
    return Kernel(name, source, {"x_ptr": "*fp32", "y_ptr": "*fp32", "B": "constexpr"}, {"B": 128},
                  num_warps=num_warps, num_stages=num_stages)  # fmt: skip


KERNELS = {
    "plain": kernel("plain", "    tl.store(y_ptr + k, tl.load(x_ptr + k) + 1)\n", num_warps=1),
    # the sine of large arguments keeps an array in local memory, and spills nothing
    "sine": kernel("sine", "    tl.store(y_ptr + k, tl.sin(tl.load(x_ptr + k)))\n"),
    # 512 values of 32 bits a thread, all alive at once
    "spilling": kernel(
        "spilling",
        "    a = tl.load(x_ptr + tl.arange(0, 512)[:, None] * 128 + k[None, :])\n"
        "    s = tl.sum(a)\n    m = tl.max(a)\n"
        "    tl.store(y_ptr + tl.arange(0, 512)[:, None] * 128 + k[None, :], (a - m) / s)\n",
    ),
    "product": kernel(
        "product",
        "    i = tl.arange(0, 64)\n    acc = tl.zeros((64, 64), tl.float32)\n"
        "    for s in range(8):\n"
        "        a = tl.load(x_ptr + i[:, None] * 512 + s * 64 + i[None, :])\n"
        "        b = tl.load(x_ptr + (s * 64 + i[:, None]) * 64 + i[None, :])\n"
        "        acc += tl.dot(a, b)\n"
        "    tl.store(y_ptr + i[:, None] * 64 + i[None, :], acc)\n",
        num_stages=3,
    ),
}
NVIDIA = [target for target, (backend, *_) in TARGETS.items() if backend == "cuda"]


@cache
def compiled(name: str, target: str) -> Compiled:
    return compile_kernel(KERNELS[name], target)


def said(command: list[object]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.one_in(8)
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", KERNELS)
def test_nvidias_figures_are_those_of_its_tools(name: str, target: str, tmp_path: Path) -> None:
    found, (cubin, ptx) = resources(compiled(name, target)), (tmp_path / "k.cubin", tmp_path / "k.ptx")
    cubin.write_bytes(compiled(name, target).asm["cubin"])
    ptx.write_text(compiled(name, target).asm["ptx"])
    usage = said([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin])
    assert found.registers == int(re.search(r"REG:(\d+)", usage)[1]) > 0
    assert found.local_bytes == int(re.search(r"STACK:(\d+)", usage)[1])
    architecture = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)[1]
    log = said([knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture}", ptx, "-o", tmp_path / "again.cubin"])
    assert found.spill_bytes == int(re.search(r"(\d+) bytes spill stores", log)[1])
    addresses = re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/", said([knobs.nvidia.cuobjdump.path, "-sass", cubin]), re.MULTILINE
    )
    assert found.code_bytes == int(addresses[-1], 16) + 16, "instructions take 16 bytes"
    assert found.scalar_registers is None and found.unknown == {}


@pytest.mark.parametrize("name", KERNELS)
def test_amds_figures_are_those_of_its_assembly(name: str) -> None:
    found, text = resources(compiled(name, "gfx942")), compiled(name, "gfx942").asm["amdgcn"]
    number = lambda key: int(re.search(rf"{key}:?\s+(\d+)", text)[1])
    assert found.registers == number(r"\.vgpr_count") > 0
    assert found.scalar_registers == number(r"\.sgpr_count") > 0
    assert found.spill_bytes == 4 * number(r"\.vgpr_spill_count")
    assert found.local_bytes == number(r"\.private_segment_fixed_size")
    assert found.code_bytes == number("; codeLenInByte =") and found.unknown == {}


def test_what_the_figures_tell_apart() -> None:
    sine, spilling, plain = (resources(compiled(name, "sm_90")) for name in ("sine", "spilling", "plain"))
    assert plain.local_bytes == plain.spill_bytes == 0
    assert sine.local_bytes > 0 and sine.spill_bytes == 0, "an array of its own is no spill"
    assert spilling.spill_bytes > 0 and spilling.local_bytes > 0
    product = resources(compiled("product", "sm_80"))
    assert product.shared_bytes >= 2 * 2 * 64 * 64 * 4, "two stages of two float32 tiles"
    assert (plain.num_warps, product.num_warps, product.num_stages) == (1, 4, 3)


@pytest.mark.parametrize("target", TARGETS)
def test_a_stored_kernel_has_the_same_figures(target: str, tmp_path: Path) -> None:
    store = KernelStore(Cache(tmp_path))
    cold, warm = (compile_kernel(KERNELS["sine"], target, store) for _ in range(2))
    assert (cold.stored, warm.stored) == (False, True)
    assert resources(warm) == resources(cold)


def test_a_figure_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    sine = compiled("sine", "sm_90")
    without = resources(replace(sine, asm={"cubin": sine.asm["cubin"]}))
    assert without.spill_bytes is None and without.unknown == {"spill_bytes": "there is no PTX to compile again"}
    assert without.registers == resources(sine).registers
    assert resources(replace(sine, asm={})).unknown["registers"] == "there is no binary"
    monkeypatch.setattr("fuseline.codegen.resources.subprocess.run", _missing)
    other = resources(replace(sine, asm={**sine.asm, "ptx": sine.asm["ptx"] + "\n// another text\n"}))
    assert other.spill_bytes is None and "ptxas cannot be run: " in other.unknown["spill_bytes"]


def _missing(*arguments: object, **options: object) -> None:
    raise FileNotFoundError("no ptxas")


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_cut_binary_gives_a_figure_that_is_wrong(target: str) -> None:
    """A file that ends early, anywhere, and a file with bytes changed: the figures, or None with a reason."""
    whole = compiled("plain", target)
    binary = "hsaco" if target == "gfx942" else "cubin"
    data, right = whole.asm[binary], resources(whole)
    for length in range(0, len(data), 97):
        found = resources(replace(whole, asm={**whole.asm, binary: data[:length]}))
        assert found == right or all("the binary" in found.unknown[name] for name in ("registers", "code_bytes"))
    for place in range(0, len(data), 61):  # whatever the bytes are, no exception
        changed = data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
        assert isinstance(resources(replace(whole, asm={**whole.asm, binary: changed})), Resources)


def test_messages() -> None:
    assert elf.message(b"\x83\xa1a\xcd\x01\x00\xa1b\x92\xc3\xc0\xa1c\xd1\xff\xfe") == {
        "a": 256,
        "b": [True, None],
        "c": -2,
    }
    assert elf.message(b"\xda\x00\x03xyz") == "xyz" and elf.message(b"\xe0") == -32 and elf.message(b"\x7f") == 127
    assert elf.message(b"\xdc\x00\x01\xc4\x02ab") == [b"ab"]
    for wrong in (b"", b"\xa5ab", b"\x91", b"\xcb" + b"\0" * 8, b"\x91" * 40 + b"\x01", b"\x81\x90\x01"):
        with pytest.raises(ValueError):
            elf.message(wrong)
