"""What a compiled kernel needs of a GPU: registers, spills, shared memory, code size. No GPU is asked.

    resources(compile_kernel(kernel, "sm_90"))  →  Resources(registers=80, spill_bytes=0, shared_bytes=14592, …)

The figures come from the binary itself: of a cubin the `.nv.info` section, of AMD's hsaco the AMDGPU note; warps,
stages and shared memory from Triton's metadata. A figure that cannot be had is None, and `unknown` says why.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from . import elf
from .offline import GPUS, Compiled

REGISTERS, FRAME = 0x2F, 0x11  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE
_WITH_NUMBER = 4  # an attribute that is followed by its size
_SPILLS = re.compile(r"(\d+) bytes spill stores")
_FIGURES = ("registers", "local_bytes", "spill_bytes", "code_bytes")


@dataclass(frozen=True)
class Resources:
    """A kernel on one target.

    registers: of a thread (vector registers, accumulators included, on AMD's GPUs). scalar_registers: of a wavefront,
    AMD only. local_bytes: memory of a thread's own, for spills and for arrays. spill_bytes: what its instructions store
    there since it fits no register, each instruction counted once. shared_bytes: of a block (workgroup). code_bytes: of
    the kernel's instructions. unknown: figure → why it is None.
    """

    registers: int | None
    spill_bytes: int | None
    local_bytes: int | None
    shared_bytes: int
    num_warps: int
    num_stages: int
    code_bytes: int | None
    scalar_registers: int | None = None
    unknown: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "scalar_registers" or value is not None}


def resources(compiled: Compiled) -> Resources:
    """The figures of a kernel that `compile_kernel` gave."""
    on_amd = GPUS[compiled.target][0] == "hip"
    known = {name: getattr(compiled, name) for name in ("shared_bytes", "num_warps", "num_stages")}
    unknown: dict[str, str] = {}
    try:
        binary = compiled.asm["hsaco" if on_amd else "cubin"]
        assert isinstance(binary, bytes)
        found = _of_amd(binary) if on_amd else _of_nvidia(binary)
    except (KeyError, ValueError) as error:
        reason = "there is no binary" if isinstance(error, KeyError) else f"the binary cannot be read: {error}"
        return Resources(**dict.fromkeys(_FIGURES), **known, unknown=dict.fromkeys(_FIGURES, reason))
    if "spill_bytes" not in found:
        spilled = _spills(str(compiled.asm.get("ptx", "")))
        if isinstance(spilled, int):
            found["spill_bytes"] = spilled
        else:
            unknown["spill_bytes"] = spilled
    unknown |= {name: "the binary does not say" for name in _FIGURES if name not in found | unknown}
    figures = {name: found.get(name) for name in (*_FIGURES, "scalar_registers")}
    return Resources(**figures, **known, unknown=unknown)


def _of_nvidia(binary: bytes) -> dict[str, Any]:
    """Registers, local memory and code of a cubin's one kernel; spills where they are known to be none."""
    found = elf.sections(binary)
    kernels = {name: of for name, of in elf.functions(found).items() if any(s.name == f".text.{name}" for s in found)}
    if len(kernels) != 1:
        raise ValueError(f"{len(kernels)} kernels in one cubin")
    ((number, size),) = kernels.values()
    values: dict[str, Any] = {"code_bytes": size}
    for section in found:
        if section.name == ".nv.info":
            values |= _attributes(section.data, number)
    if values.get("local_bytes") == 0:
        values["spill_bytes"] = 0
    return values


def _attributes(data: bytes, number: int) -> dict[str, int]:
    """The attributes of the function that is symbol `number`."""
    names, found, at = {REGISTERS: "registers", FRAME: "local_bytes"}, dict[str, int](), 0
    while at + 4 <= len(data):
        form, attribute, size = data[at], data[at + 1], int.from_bytes(data[at + 2 : at + 4], "little")
        at += 4
        if form != _WITH_NUMBER:  # the two bytes are the value
            continue
        if attribute in names and size == 8 and int.from_bytes(data[at : at + 4], "little") == number:
            found[names[attribute]] = int.from_bytes(data[at + 4 : at + 8], "little")
        at += size
    return found


@cache
def _spills(ptx: str) -> int | str:
    """Bytes that the instructions store to spill registers, as ptxas counts them; or why it cannot be asked.

    Only kernels with local memory are asked about: it may be spills, or an array of the kernel's own (Triton's sine of
    large arguments has one).
    """
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if architecture is None:
        return "there is no PTX to compile again"
    if importlib.util.find_spec("triton") is None:
        return "Triton's ptxas is not installed"
    from triton import knobs

    with tempfile.TemporaryDirectory(prefix="fuseline-") as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture[1]}", path, "-o", path.with_suffix(".o")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"ptxas cannot be run: {error}"
    stores = _SPILLS.search(done.stderr)
    return int(stores[1]) if stores else "ptxas does not say"


def _of_amd(binary: bytes) -> dict[str, Any]:
    """Registers, spills, local memory and code of a hsaco's one kernel, from its metadata note."""
    found = elf.sections(binary)
    for section in found:
        for owner, _, content in elf.notes(section) if section.kind == elf.NOTE else ():
            if owner != "AMDGPU":
                continue
            note = elf.message(content)
            kernels = note.get("amdhsa.kernels") if isinstance(note, dict) else None
            if not isinstance(kernels, list) or len(kernels) != 1 or not isinstance(kernels[0], dict):
                raise ValueError("its note does not describe one kernel")
            (kernel,) = kernels
            named = {"registers": ".vgpr_count", "scalar_registers": ".sgpr_count"}
            named |= {"local_bytes": ".private_segment_fixed_size", "spill_bytes": ".vgpr_spill_count"}
            values = {name: kernel[key] for name, key in named.items() if isinstance(kernel.get(key), int)}
            if "spill_bytes" in values:
                values["spill_bytes"] *= 4  # it counts registers of 32 bits
            if (of := elf.functions(found).get(kernel.get(".name", ""))) is not None:
                values["code_bytes"] = of[1]
            return values
    raise ValueError("it has no AMDGPU note")
