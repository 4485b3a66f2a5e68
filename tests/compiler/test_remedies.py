"""Every remedy is tried: the line breaks the graph for the reason named, and what is advised leaves one graph."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fuseline.compiler.debug.dry_run import dry_run
from fuseline.compiler.debug.remedies import REMEDIES, remedy

log = logging.getLogger(__name__)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    with torch.no_grad():
        yield


def prints(x):
    print(end="")
    return x + 1


def prints_unless_compiled(x):
    if not torch.compiler.is_compiling():
        print(end="")
    return x + 1


def logs(x):
    log.info("mean")
    return x + 1


def logs_unless_compiled(x):
    if not torch.compiler.is_compiling():
        log.info("mean")
    return x + 1


def warns(x):
    warnings.warn("slow", stacklevel=2)
    return x + 1


def warns_unless_compiled(x):
    if not torch.compiler.is_compiling():
        warnings.warn("slow", stacklevel=2)
    return x + 1


def branches(x):
    if x.mean() > 0:
        return x + 1
    return x - 1


def chooses(x):
    return torch.where(x.mean() > 0, x + 1, x - 1)


def loops(x):
    while x.abs().max() > 1:
        x = x / 2
    return x


def loops_a_fixed_number_of_steps(x):
    for _ in range(4):
        x = torch.where(x.abs().max() > 1, x / 2, x)
    return x


def compares(x):
    return x + 1 if torch.equal(x, x.abs()) else x


def compares_as_tensors(x):
    return torch.where((x == x.abs()).all(), x + 1, x)


def item(x):
    return x * x.sum().item()


def stays_a_tensor(x):
    return x * x.sum()


def lists(x):
    return x + sum(x.mean(1).tolist())


def sums(x):
    return x + x.mean(1).sum()


def compresses(x):
    return x[x > 0] * 2


def masks(x):
    return torch.where(x > 0, x * 2, 0.0)


def numpy_only(x):
    return x + torch.from_numpy(np.linalg.eigvalsh(np.cov(x.numpy()))).sum()


def in_torch(x):
    return x + torch.linalg.eigvalsh(torch.cov(x)).sum()


@torch.compiler.disable
def apart(x):
    return x + 1


def calls_a_disabled_one(x):
    return apart(x * 2)


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.scale = x.sum().item()
        return x * ctx.scale

    @staticmethod
    def backward(ctx, g):
        return g * ctx.scale


class Pure(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sum()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.sum()


def applies_a_noisy_function(x):
    return Noisy.apply(x) + 1


def applies_a_pure_function(x):
    return Pure.apply(x) + 1


def copies(x):
    return copy.deepcopy(x * 2) + 1


def clones(x):
    return (x * 2).clone() + 1


def reads_a_clock(x):
    return x + time.perf_counter() * 0


def seeds(x):
    torch.manual_seed(0)
    return x + torch.rand(4)


def draws(x):
    return x + torch.rand(4)


def opens(x):
    open("/dev/null").close()
    return x + 1


def knows_an_address(x):
    return x * (x.data_ptr() != 0)


def does_nothing_else(x):
    return x + 1


def differentiates(x):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (y * y).sum().backward()
    return x + y.grad


def differentiates_functionally(x):
    return x + torch.func.grad(lambda y: (y * y).sum())(x)


PAIRS = [
    (prints, prints_unless_compiled, "printing"),
    (logs, logs_unless_compiled, "logging"),
    (warns, warns_unless_compiled, "warning"),
    (branches, chooses, "branch on a tensor"),
    (loops, loops_a_fixed_number_of_steps, "branch on a tensor"),
    (compares, compares_as_tensors, "comparison to a Python bool"),
    (item, stays_a_tensor, "tensor to Python number"),
    (lists, sums, "tensor to Python list"),
    (compresses, masks, "result of unknown size"),
    (calls_a_disabled_one, stays_a_tensor, "disabled function"),
    (copies, clones, "deep copy"),
    (reads_a_clock, does_nothing_else, "clock"),
    (seeds, draws, "random numbers"),
    (opens, does_nothing_else, "files"),
    (knows_an_address, does_nothing_else, "address of a tensor"),
    (differentiates, differentiates_functionally, "gradient inside forward"),
    (applies_a_noisy_function, applies_a_pure_function, "tensor to Python number"),
]


class Calls(nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("broken", "mended", "kind"), PAIRS, ids=lambda v: getattr(v, "__name__", None))
def test_a_remedy(broken: Callable, mended: Callable, kind: str) -> None:
    x = torch.rand(4, 4) + 0.5
    found = dry_run(Calls(broken), (x,))
    assert {b.remedy.kind for b in found.breaks} == {kind}
    assert all(b.at.file == __file__ for b in found.breaks)
    repaired = dry_run(Calls(mended), (x,))
    assert repaired.breaks == [] and len(repaired.graphs) == 1 and repaired.graphs[0].program is not None


def test_settings_that_are_advised_exist_and_help() -> None:
    x = torch.rand(4, 4) + 0.5
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert dry_run(Calls(item), (x,)).breaks == []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert dry_run(Calls(compresses), (x,)).breaks == []
    with torch._dynamo.config.patch(reorderable_logging_functions={print}):
        assert dry_run(Calls(prints), (x,)).breaks == []


@pytest.mark.parametrize(
    ("message", "code", "kind"),
    [
        ("x\n  Explanation: y\n  Hint: Try `torch.special`.\n", "", "other"),
        (
            "Attempted to call function marked as skipped\n  Explanation: a C/C++ Python extension",
            "",
            "C or C++ extension",
        ),
        ("Unsupported context manager\n  Explanation: Dynamo does not know", "with Timer():", "context manager"),
        ("something new", "y = np.cumsum(x)", "numpy"),
    ],
)
def test_messages(message: str, code: str, kind: str) -> None:
    assert remedy(message, code).kind == kind


def test_a_message_that_is_not_known_comes_with_dynamos_own_hint() -> None:
    unknown = "new\n  Explanation: new\n  Hint: Please report an issue to PyTorch.\n  Hint: Use `torch.new`.\n"
    assert remedy(unknown).advice == "Use `torch.new`"
    assert remedy("new").advice.startswith("move the line out of forward")


def test_each_remedy_says_what_to_do() -> None:
    assert all(len(one.advice) > 20 and (one.message or one.code) for one in REMEDIES)
