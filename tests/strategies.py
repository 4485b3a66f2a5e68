"""Random weight expressions, schemes, graphs and pipelines for hypothesis."""

from __future__ import annotations

import enum
import os
import typing
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import reject, settings, strategies as st

from fuseline.compiler.compensated import Compensated
from fuseline.compiler.errors import UserError
from fuseline.compiler.expert_expressions import Mixed, Paired, PairedCodes, PairsInWords
from fuseline.compiler.expressions import (
    Add,
    Blocks,
    Cast,
    Centre,
    Concat,
    Constant,
    Decided,
    Decode,
    Dequantize,
    Expression,
    Fitted,
    Hadamard,
    HadamardCore,
    HalfQuadratic,
    InWords,
    Matmul,
    Offset,
    Orthogonal,
    Output,
    Pack,
    Param,
    Planned,
    Quantize,
    Range,
    Reshape,
    Scale,
    Signs,
    Slice,
    Steps,
    Transpose,
)  # fmt: skip
from fuseline.compiler.formats import FORMATS
from fuseline.compiler.framework import Level, Pass, Tier, options
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.registry import available
from fuseline.compiler.schemes import Scheme

# The same examples at every run, so that a failure is the change's own; FUSELINE_FUZZ=1 looks for new ones.
settings.register_profile("fuseline", deadline=None, derandomize="FUSELINE_FUZZ" not in os.environ)
settings.load_profile("fuseline")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
names = st.text("abcdefgh._0123456789", min_size=1, max_size=12)


@st.composite
def schemes(draw: st.DrawFn, formats: Iterable[str] = FORMATS, groups: Iterable[int] = (0, 2, 16, 64)) -> Scheme:
    """Schemes of every format, granularity, symmetry and search that the text form can name."""
    form = FORMATS[draw(st.sampled_from(sorted(formats)))]
    group = form.group or draw(st.sampled_from(tuple(groups)))
    rows = 1 if form.group else draw(st.sampled_from((1, 1, group or 0) if group != 1 else (1,)))
    return Scheme(form.name, group, not form.affine or draw(st.booleans()), draw(st.booleans()), rows)


devices = st.sampled_from(("cpu", "cuda:0"))
constants = st.lists(st.floats(allow_nan=False, width=32), max_size=4).map(
    lambda v: Constant(tuple(v), (len(v),), torch.float32, "cpu")
)
numbers = st.floats(-9, 9, width=32)
groups = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=3).map(tuple)
planned = st.builds(lambda n, device: Planned.of(torch.eye(n, dtype=torch.float64), device), st.integers(0, 3), devices)
leaves = st.one_of(
    st.builds(Param, names),
    planned,
    constants,
    st.builds(HadamardCore, st.sampled_from((3, 12, 20)), devices, st.sampled_from((torch.int8, *DTYPES))),
    st.builds(Steps, names, st.integers(2, 4), devices),
    st.builds(Signs, st.integers(1, 8), st.integers(0, 2**40), st.sampled_from(DTYPES), devices),
)


def expressions() -> st.SearchStrategy[Expression]:
    """Well-typed trees of the whole grammar, with no care for shapes: for printing and reading."""

    def grow(x: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        small = st.integers(0, 3)
        return st.one_of(
            st.builds(Cast, x, st.sampled_from(DTYPES)),
            st.builds(Matmul, x, x),
            st.builds(Scale, x, x, st.integers(-2, 1)),
            st.builds(Slice, x, small, small, small),
            st.builds(Concat, st.lists(x, min_size=1, max_size=3).map(tuple), small),
            st.builds(Transpose, x, small, small),
            st.builds(Add, x, x),
            st.builds(Offset, x, st.floats(-2, 2, width=32)),
            st.builds(Centre, x, small),
            st.builds(Blocks, x, st.builds(Orthogonal, st.integers(1, 9), small, st.just("cpu")), small),
            st.builds(Reshape, x, st.lists(small, max_size=3).map(tuple)),
            st.builds(Hadamard, x, st.integers(-2, 1), st.sampled_from((0, 4, 12))),
            st.builds(Quantize, x, schemes()),
            st.builds(HalfQuadratic, x, schemes()),
            st.builds(Compensated, x, schemes(), st.lists(small, max_size=3).map(tuple), small, st.booleans()),
            st.builds(Mixed, x, groups, st.lists(st.tuples(numbers), max_size=3).map(tuple), st.booleans()),
            st.builds(Paired, x, groups, numbers, st.none() | planned, st.booleans(), st.booleans()),
            st.builds(PairedCodes, x, groups, numbers, st.sampled_from(("fp8", "int4")), small, st.none() | planned),
            st.builds(PairsInWords, x, st.sampled_from(("fp8", "int4")), small, small, small, st.sampled_from((8, 64))),
            st.builds(Range, x, schemes()),
            st.builds(Decided, x, planned, planned, st.none() | planned, st.tuples(numbers, numbers)),
            st.builds(Fitted, x, planned, st.tuples(numbers, numbers)),
            st.builds(Output, x, st.sampled_from(("codes", "scale", "zero", "outer"))),
            st.builds(Pack, x, schemes()),
            st.builds(InWords, x, schemes(), small, small, st.sampled_from((8, 16))),
            st.builds(Dequantize, x, x, st.none() | x, st.sampled_from((4, 8)), small, st.sampled_from(DTYPES)),
            st.builds(
                Decode, x, x, st.none() | x, st.none() | x, st.sampled_from(sorted(FORMATS)), small, st.booleans(),
                st.sampled_from(DTYPES),
            ),
        )  # fmt: skip

    return st.recursive(leaves, grow, max_leaves=6)


_UNARY: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    torch.neg, torch.tanh, F.silu, torch.sigmoid, lambda x: x * 0.5, lambda x: x + 1.0, lambda x: torch.softmax(x, -1),
    lambda x: x - x.mean(-1, keepdim=True), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
)  # fmt: skip
_BINARY: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...] = (
    torch.add, torch.mul, torch.maximum, torch.sub, lambda a, b: a * torch.sigmoid(b),
)  # fmt: skip


@st.composite
def networks(draw: st.DrawFn, width: int = 6) -> torch.nn.Module:
    """A random directed acyclic network over [tokens, width]: pointwise and row operations, linears, computed weights,
    writes into a cache with reads before and after; several outputs, in float64."""
    steps: list[tuple[Any, ...]] = []
    count = 2

    def pick() -> int:
        return draw(st.integers(0, count - 1))

    for _ in range(draw(st.integers(2, 14))):
        kind = draw(st.sampled_from(("unary", "binary", "binary", "linear", "linear", "computed", "write", "read")))
        if kind == "unary":
            steps.append((kind, draw(st.integers(0, len(_UNARY) - 1)), pick()))
        elif kind == "binary":
            steps.append((kind, draw(st.integers(0, len(_BINARY) - 1)), pick(), pick()))
        elif kind == "linear":
            steps.append((kind, draw(st.integers(0, 2)), pick()))
        elif kind == "computed":
            steps.append((kind, pick(), pick()))
        else:
            steps.append((kind, pick()))
        count += 1
    outputs = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3))
    return Network(steps, outputs, width)


class Network(torch.nn.Module):
    """A list of steps over numbered values; value 0 is the input, value 1 its negative."""

    def __init__(self, steps: list[tuple[Any, ...]], outputs: list[int], width: int):
        super().__init__()
        self.steps, self.outputs = steps, outputs
        torch.manual_seed(0)
        self.linears = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3)).double()

    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x, -x]
        for kind, *given in self.steps:
            if kind == "unary":
                values.append(_UNARY[given[0]](values[given[1]]))
            elif kind == "binary":
                values.append(_BINARY[given[0]](values[given[1]], values[given[2]]))
            elif kind == "linear":
                values.append(self.linears[given[0]](values[given[1]]))
            elif kind == "computed":
                a, b = values[given[0]], values[given[1]]
                values.append(F.linear(a, torch.tanh(b.t() @ b)))
            elif kind == "write":
                values.append(cache.copy_(torch.tanh(values[given[0]])) * 1.0)
            else:
                values.append(cache + values[given[0]])
        return tuple(values[i] for i in self.outputs)

    def __repr__(self) -> str:
        return f"Network({self.steps}, {self.outputs})"


def exact_passes() -> list[type[Pass]]:
    """This package's own passes that need neither data nor other processes, and keep results: the modules of other
    tests register faulty ones."""
    return [
        kind
        for kind in available().values()
        if kind.__module__.startswith("fuseline.") and kind.tier is Tier.EXACT and kind.level is Level.NORMAL
        if not kind.needs_data and kind.name != "sequence-parallel"
    ]


def with_options(kind: type[Pass]) -> st.SearchStrategy[Pass]:
    """A pass with random values of its options that are flags or choices; the others keep their defaults."""
    hints = typing.get_type_hints(kind)
    drawn: dict[str, st.SearchStrategy[Any]] = {}
    for field in options(kind):
        hint = hints[field.name]
        if field.name == "allow_empty":
            drawn[field.name] = st.just(True)
        elif hint is bool:
            drawn[field.name] = st.sampled_from((field.default, not field.default))
        elif isinstance(hint, type) and issubclass(hint, enum.Enum):
            drawn[field.name] = st.sampled_from(hint)

    def build(values: dict[str, Any]) -> Pass:
        try:
            return kind(**values)
        except UserError:  # these values do not go together
            reject()

    return st.fixed_dictionaries(drawn).map(build)


def _quantizer(weights: Scheme, activations: bool) -> Pass:
    rest = ",activations=int8" if activations else ""
    return Pipeline(f"quantize{{weights={weights}{rest},allow_empty}}").passes[0]


# The last group divides no width of `blocks()`.
quantizers = st.builds(_quantizer, schemes(groups=(0, 2, 4, 8, 16, 5)).filter(lambda s: not s.mse), st.booleans())


@st.composite
def pipelines(draw: st.DrawFn, quantize: bool = False) -> Pipeline:
    """Exact passes in any order that they allow, some more than once; with `quantize`, quantized once before `fuse`."""
    passes: list[Pass] = []
    state: frozenset[str] = frozenset()
    for _ in range(draw(st.integers(0 if quantize else 1, 4))):
        step = draw(st.sampled_from([k for k in exact_passes() if k.requires <= state]).flatmap(with_options))
        passes.append(step)
        state |= step.ensures
    if quantize:
        last = next((i for i, step in enumerate(passes) if step.name == "fuse"), len(passes))
        passes.insert(draw(st.integers(0, last)), draw(quantizers))
    return Pipeline(passes)
