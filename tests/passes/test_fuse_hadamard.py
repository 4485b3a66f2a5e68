"""fuse: a Hadamard transform takes along what comes before and after it, over the same rows."""

from __future__ import annotations

import torch

from fuseline import Pipeline
from fuseline.codegen.lower import lower
from fuseline.compiler.flatten import flatten
from fuseline.compiler.hadamard import core
from fuseline.compiler.precision import error
from tests.helpers.models import traced
from tests.passes.test_fuse import FUSE, regions

own = torch.ops.fuseline


def test_gated_unit_signs_transform_and_codes_are_one_kernel() -> None:
    def online(gate, up, signs, c):
        h = own.hadamard(own.glu(gate, up, "silu") * signs, c)
        return own.quantize(h, 8, 96)

    program, _ = FUSE.run(traced(online, torch.randn(3, 96), torch.randn(3, 96), torch.ones(96), core(12)), [], "full")
    assert regions(program) == [["glu", "mul", "hadamard", "quantize"]]
    lowered = lower(program)
    assert not lowered.refusals and len(lowered.kernels) == 1
    assert lowered.kernels[0].ops[2] == "fuseline.hadamard.default"


def test_groups_of_other_channels_stay_apart() -> None:
    def grouped(x):
        return own.quantize(own.hadamard(x), 8, 16)

    def in_blocks(x):
        return own.quantize(own.hadamard(x, None, 16), 8, 16)

    assert regions(FUSE.run(traced(grouped, torch.randn(3, 64)), [], "full")[0]) == [["hadamard"], ["quantize"]]
    together, _ = FUSE.run(traced(in_blocks, torch.randn(3, 64)), [], "full")
    assert regions(together) == [["hadamard", "quantize"]]
    assert not lower(together).refusals


def test_a_norm_joins_the_transform() -> None:
    def rotated(x, w):
        return own.rms_norm(own.hadamard(x), w, 1e-6)

    program, _ = FUSE.run(traced(rotated, torch.randn(3, 64), torch.randn(64)), [], "full")
    assert regions(program) == [["hadamard", "rms_norm"]] and not lower(program).refusals


def test_what_no_kernel_holds_runs_through_pytorch() -> None:
    x = torch.randn(2, 65536).bfloat16()
    program, _ = FUSE.run(traced(lambda x: own.hadamard(x) * 2, x), [], "full")
    (reason,) = lower(program).refusals.values()
    assert reason.endswith("hadamard: 65536 channels, a program holds at most 32768")
    assert torch.equal(program.to_module()(x), own.hadamard(x) * 2)


def test_written_out_it_is_plain_aten() -> None:
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    program = traced(lambda x, c: own.hadamard(x, c), x, core(12))
    module, _ = program.lift()
    written = flatten(program, module)
    assert all(getattr(n.target, "namespace", "aten") == "aten" for n in written.graph.nodes if n.op == "call_function")
    assert error(written(x, core(12)), own.hadamard(x, core(12))) < 1e-14


def test_fused_or_not_is_the_same_in_eager() -> None:
    x, signs = torch.randn(3, 64), torch.ones(64)
    program = traced(lambda x, s: own.hadamard(x * s).float(), x, signs)
    plain = program.to_module()(x, signs)
    after, _ = Pipeline("fuse").run(program, [], "full")
    assert torch.equal(after.to_module()(x, signs), plain)
