"""What is emitted for caches of codes; tests/interpreted and tests/gpu run it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fuseline.codegen.kernel import Kernel, Launcher, Refusal
from fuseline.codegen.offline import compile_kernel
from fuseline.codegen.resources import resources
from fuseline.codegen.templates.cached import emit_cached
from fuseline.codegen.templates.cached_numbers import numbers
from fuseline.codegen.templates.text import Text
from fuseline.compiler.cached import CacheScheme
from tests.codegen.cached_cases import Cached, writes
from tests.codegen.regions import region

LAYER = Cached(
    "layer", "int4:channel:g64", "int4:token:g64", heads=32, kv_heads=8, head=128, head_v=128, block=128, capacity=1024
)


def emitted(case: Cached, dtype: torch.dtype = torch.bfloat16) -> Launcher:
    launcher = emit_cached(case.graph(dtype), "attend")
    assert isinstance(launcher, Launcher), launcher
    return launcher


def with_ptx(kernel: Kernel) -> Kernel:
    return replace(kernel, constants={**kernel.constants, "PTX": True})


TARGETS = ["sm_80", "sm_90", "gfx942"]


@pytest.mark.one_in(12)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "case",
    [
        replace(LAYER, mask="causal"),
        replace(LAYER, keys="fp8:token", values="fp8:token:g32"),
        replace(LAYER, keys="int8:channel", values="int2:token"),
        Cached("tada", "int4:token", "int4:token:g16", centred=True),
    ],
    ids=lambda c: f"{c.keys} {c.values}",
)
def test_kernels_compile_for_every_target(case: Cached, target: str) -> None:
    for kernel in emitted(case).kernels:
        nvidia = "PTX" in kernel.constants and target != "gfx942"
        compile_kernel(with_ptx(kernel) if nvidia else kernel, target)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("scheme", "values"), [("int4:channel:g64", False), ("fp8:token:g64", True)])
def test_writes_compile_for_every_target(scheme: str, values: bool, target: str) -> None:
    launcher = emit_cached(writes(replace(LAYER, keys=scheme, values=scheme), values, torch.bfloat16), "write")
    assert isinstance(launcher, Launcher), launcher
    compile_kernel(launcher.kernels[0], target)


def test_codes_stay_in_registers_on_hopper() -> None:
    """They go from memory to shared memory, and to the tensor cores from registers: nothing is spilled."""
    split = emitted(LAYER).kernels[0]
    compiled = compile_kernel(with_ptx(split), "sm_90")
    used = resources(compiled)
    assert compiled.shared_bytes <= 64 << 10 and used.spill_bytes == 0
    assert used.registers is None or used.registers <= 168  # three programs of 128 threads on a multiprocessor
    graph = str(compiled.asm["ttgir"])
    assert graph.count("elementwise_inline_asm") == 2 * 2 + 2  # two planes of keys a sub-tile, two planes of values
    loop = graph.partition("scf.for")[2].partition("scf.yield")[0]
    moved = re.findall(r"ttg.local_alloc %\S+ : \(tensor<(\d+)x\d+xbf16", loop)
    assert set(moved) <= {"16"}  # the probabilities of 16 rows, no keys or values


def test_scales_that_are_not_copied_ahead_are_read_a_block_ahead() -> None:
    """Of fewer than four bytes a thread: those of a head's groups of 64 values, but not a block's scales by channel."""

    def ahead(case: Cached) -> set[str]:
        source = emitted(case).kernels[0].source
        before, _, loop = source.partition("for start in range")
        loop = loop.partition("for r0 in range")[0]
        fetched = set(re.findall(r"^ +(\w+)_raw = ", before, re.MULTILINE))
        for name in fetched:  # in the loop it is used, and only then read again
            use, load = loop.index(f"({name}_raw["), loop.index(f"{name}_raw = ")
            assert use < load
        assert fetched == set(re.findall(r"^ +(\w+)_raw = ", loop, re.MULTILINE))
        assert ("ahead = " in source) == bool(fetched)
        return fetched

    values = {f"v{u}_{part}" for u in range(2) for part in ("scale", "low")}
    assert ahead(LAYER) == values
    keys = {f"k{u}_{plane}_{part}" for u in range(2) for plane in range(2) for part in ("scale", "low")}
    assert ahead(replace(LAYER, keys="int4:channel:g32", values="int4:token:g32")) == keys
    assert not ahead(replace(LAYER, keys="int4:token", values="int4:token"))
    assert not ahead(replace(LAYER, keys="int2:channel:g16", values="int2:token:g16"))  # too many for the registers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("form", ["int4", "int2", "int8", "int4:sym", "int8:sym", "fp8"])
def test_instructions_make_the_numbers_that_the_codes_stand_for(form: str, dtype: torch.dtype) -> None:
    """The PTX of every plane, run by hand on all bytes."""
    scheme = CacheScheme.parse(form)
    if scheme.format == "int8" and dtype == torch.float16:
        pytest.skip("its conversion is Triton's own")
    for plane in range(8 // scheme.bits):
        text = Text()
        numbers(text, "made", "loaded", plane, scheme, dtype)
        found = _run(str(text), torch.arange(256, dtype=torch.uint8), dtype)
        code = torch.arange(256) >> scheme.bits * plane & 2**scheme.bits - 1
        exact = code.double() - (0 if scheme.low else 2 ** (scheme.bits - 1))
        if form == "fp8":
            exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        known = exact.isfinite()
        assert torch.equal(found.double()[known], exact[known])


def _run(text: str, loaded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The lines of `if PTX:` and those behind them, on bytes four at a time."""
    values: dict[str, torch.Tensor] = {}
    for name, asm in re.findall(r"(\w+) = tl\.inline_asm_elementwise\(\s*((?:\"[^\"]*\"\s*)+),", text):
        program = "".join(re.findall(r'"([^"]*)"', asm)).strip("{} ").split(";")
        halves = []
        for four in loaded.view(-1, 4).tolist():
            word = {"$2": int.from_bytes(bytes(four), "little")}
            for line in filter(None, map(str.strip, program)):
                _step(line, word)
            halves += [word[r] >> shift & 0xFFFF for r in ("$0", "$1") for shift in (0, 16)]
        values[name] = torch.tensor(halves, dtype=torch.int32).to(torch.int16).view(dtype)
    rest = [line for line in text.splitlines() if not line.startswith(" ") and re.match(r"\w+ = .*[-*+]", line)]
    for line in rest:
        name, _, formula = line.partition(" = ")
        if "inline_asm" not in line:
            values[name] = _arithmetic(formula, values)
    return values["made"]


def _step(line: str, word: dict[str, int]) -> None:
    op, _, operands = line.partition(" ")
    if op == ".reg":
        return
    target, *given = [o.strip() for o in operands.split(",")]
    a, b, c = ([word[g] if g in word else int(g, 0) for g in given] + [0, 0])[:3]
    if op == "prmt.b32":
        both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        word[target] = int.from_bytes(bytes(both[c >> 4 * i & 7] for i in range(4)), "little")
    else:
        table = {"mov.b32": a, "shr.b32": a >> b, "shr.u32": a >> b, "and.b32": a & b, "lop3.b32": (a & b) | c}
        word[target] = table[op]


def _arithmetic(formula: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sums and products of named tensors and numbers, as these lines have them."""
    if " + " in formula:
        first, second = formula.split(" + ")
        return _arithmetic(first.strip("()"), values) + _arithmetic(second.strip("()"), values)
    name, op, number = formula.split(" ")
    return values[name] - float(number) if op == "-" else values[name] * float(number)


def test_a_prompt_goes_to_pytorch_and_layers_share_their_kernels() -> None:
    one, other = emitted(Cached("a", length=70)), emitted(Cached("b", length=9, batch=2))
    assert [k.source for k in one.kernels] == [k.source for k in other.kernels]
    assert re.search(r"if rows > 64 .*:  # many queries.*\n\s+return torch.ops.fuseline.cache_attention", one.source)


def test_refusals_name_the_fact() -> None:
    def refused(case: Cached, dtype: torch.dtype = torch.float32) -> str:
        answer = emit_cached(case.graph(dtype), "attend")
        assert isinstance(answer, Refusal), answer
        return answer.reason

    assert "torch.float64" in refused(Cached("double"), torch.float64)
    assert "heads of 512" in refused(Cached("wide", head=512))
    assert "8 bytes, at least 16" in refused(Cached("short", values="int2:token", block=32))
    assert "groups of 24 of 48 channels" in refused(Cached("odd", values="int4:token:g24", head_v=48))
    write = emit_cached(writes(Cached("odd", head=80), False, torch.float32), "write")
    assert isinstance(write, Refusal) and "80 channels" in write.reason
    other = emit_cached(region(lambda x: x + 1, [torch.ones(3)]), "attend")
    assert isinstance(other, Refusal) and "not an attention over a cache" in other.reason
