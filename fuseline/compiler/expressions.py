"""Weight expressions: what a pass puts in the place of a weight, never touching its storage.

    Pack(Output(Quantize(Param("mlp.up_proj.weight"), scheme), "codes"), scheme)

A closed grammar of frozen, typed, serialisable nodes. Algebra that folds into weights (matmul, scale, hadamard) is
computed in float64 and cast back to the type of its first operand. `evaluate` runs on real tensors and on fake ones
alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .errors import FuselineError, UserError
from .formats.learned import initial_range
from .formats.words import Words, as_bits, as_stored
from .hadamard import core, factor, random_orthogonal, random_signs
from .half_quadratic import half_quadratic
from .ops import decode, dequantize, hadamard
from .ops.staircase import begun
from .planned import keep, kept, probe, same_weight
from .schemes import Scheme

Lookup = Callable[[str], torch.Tensor]
Memo = dict["Expression", Any]


@dataclass(frozen=True)
class Expression:
    """A node of the grammar; its dataclass fields that are expressions are its operands."""

    def operands(self) -> tuple[Expression, ...]:
        found: list[Expression] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            found += [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Expression)]
        return tuple(found)

    def parameters(self) -> tuple[str, ...]:
        """Qualified names of the parameters below, in order, each once."""
        return tuple(dict.fromkeys(e.name for e in self.walk() if isinstance(e, Param)))

    def walk(self) -> Iterator[Expression]:
        yield self
        for operand in self.operands():
            yield from operand.walk()

    def rename(self, names: dict[str, str]) -> Expression:
        """The same expression over other parameters."""
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Expression):
                changes[field.name] = value.rename(names)
            elif isinstance(value, tuple) and any(isinstance(v, Expression) for v in value):
                changes[field.name] = tuple(v.rename(names) for v in value)
        return dataclasses.replace(self, **changes)

    def evaluate(self, lookup: Lookup, memo: Memo | None = None) -> Any:
        """The tensor this stands for (a dict of tensors for `Quantize`), given the parameters."""
        memo = {} if memo is None else memo
        if self not in memo:
            memo[self] = self.compute([o.evaluate(lookup, memo) for o in self.operands()], lookup)
        return memo[self]

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"op": type(self).__name__.lower()}
        for field in dataclasses.fields(self):
            record[field.name] = _encode(getattr(self, field.name))
        return record

    @staticmethod
    def from_json(record: dict[str, Any]) -> Expression:
        kind = GRAMMAR.get(record.get("op", ""))
        if kind is None:
            raise FuselineError(f"unknown weight expression '{record.get('op')}'", [f"known: {', '.join(GRAMMAR)}"])
        return kind(**{name: _decode(value) for name, value in record.items() if name != "op"})


@dataclass(frozen=True)
class Param(Expression):
    """A parameter or buffer, by its qualified name."""

    name: str

    def rename(self, names: dict[str, str]) -> Expression:
        return Param(names.get(self.name, self.name))

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return lookup(self.name)


@dataclass(frozen=True)
class Constant(Expression):
    """A tensor that the model's code wrote down (`torch.tensor([1.0, 2.0])`): its elements, row by row."""

    values: tuple[bool | int | float, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return torch.tensor(self.values, dtype=self.dtype, device=self.device).reshape(self.shape)


@dataclass(frozen=True)
class Cast(Expression):
    """x in another dtype."""

    x: Expression
    dtype: torch.dtype

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return values[0].to(self.dtype)


@dataclass(frozen=True)
class Matmul(Expression):
    """a @ b in float64, in a's dtype."""

    a: Expression
    b: Expression

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        a, b = values
        return (a.double() @ b.double()).to(a.dtype)


@dataclass(frozen=True)
class Scale(Expression):
    """x with dimension `dim` multiplied by the vector `by`, in float64, in x's dtype."""

    x: Expression
    by: Expression
    dim: int

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        x, by = values
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return (x.double() * by.double().to(x.device).view(shape)).to(x.dtype)


@dataclass(frozen=True)
class Slice(Expression):
    """x[start:end] along `dim`."""

    x: Expression
    dim: int
    start: int
    end: int

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return values[0].narrow(self.dim, self.start, self.end - self.start).contiguous()


@dataclass(frozen=True)
class Concat(Expression):
    """xs joined along `dim`."""

    xs: tuple[Expression, ...]
    dim: int

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return torch.cat(values, self.dim)


@dataclass(frozen=True)
class Transpose(Expression):
    """x with two dimensions exchanged, contiguous."""

    x: Expression
    first: int
    second: int

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return values[0].transpose(self.first, self.second).contiguous()


@dataclass(frozen=True)
class Reshape(Expression):
    """x's elements, row by row, in another shape (a convolution's kernel as a matrix)."""

    x: Expression
    shape: tuple[int, ...]

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return values[0].reshape(self.shape)


@dataclass(frozen=True)
class Add(Expression):
    """a + b in float64, in a's dtype; b broadcasts."""

    a: Expression
    b: Expression

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        a, b = values
        return (a.double() + b.double()).to(a.dtype)


@dataclass(frozen=True)
class Offset(Expression):
    """x + by, a number, in float64, in x's dtype."""

    x: Expression
    by: float

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return (values[0].double() + self.by).to(values[0].dtype)


@dataclass(frozen=True)
class Centre(Expression):
    """x less its mean along `dim`, in float64, in x's dtype."""

    x: Expression
    dim: int

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        x = values[0].double()
        return (x - x.mean(self.dim, keepdim=True)).to(values[0].dtype)


@dataclass(frozen=True)
class Orthogonal(Expression):
    """A random orthogonal matrix [n, n], float64, uniform over all of them, that `seed` determines (Stewart, 1980)."""

    n: int
    seed: int
    device: str

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        made = torch.empty(self.n, self.n, dtype=torch.float64, device=self.device)
        return (
            made.copy_(random_orthogonal(self.n, self.seed)) if type(made) is torch.Tensor else made
        )  # else a fake one


@dataclass(frozen=True)
class Planned(Expression):
    """A tensor that a plan holds, by the digest of its contents (`planned.py`)."""

    digest: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @staticmethod
    def of(tensor: torch.Tensor, device: str) -> Planned:
        return Planned(keep(tensor), tuple(tensor.shape), tensor.dtype, device)

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        made = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return made.copy_(kept(self.digest)) if type(made) is torch.Tensor else made  # else a fake one


@dataclass(frozen=True)
class Blocks(Expression):
    """x with each block of channels along `dim` multiplied by the matrix `by` [b, b] from the right, in x's dtype.

    Computed in float64. The dimension is a number of blocks of b.
    """

    x: Expression
    by: Expression
    dim: int

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        x, by = values
        return block_product(x.double(), by.double().to(x.device), self.dim).to(x.dtype).contiguous()


def block_product(x: torch.Tensor, by: torch.Tensor, dim: int) -> torch.Tensor:
    """x with each block of channels along `dim` multiplied by the matrix `by` [b, b] from the right, in their type."""
    blocks = x.movedim(dim, -1).unflatten(-1, (-1, by.shape[0])) @ by
    return blocks.flatten(-2).movedim(-1, dim)


@dataclass(frozen=True)
class HadamardCore(Expression):
    """The dense core of `hadamard.factor`, [order, order], symmetric: signs in any type, or a Hartley matrix."""

    order: int
    device: str
    dtype: torch.dtype = torch.int8

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return core(self.order, self.device).to(self.dtype)


def online_core(n: int, dtype: torch.dtype, device: torch.device | str) -> tuple[HadamardCore | None, bool]:
    """The core that `fuseline::hadamard` takes for blocks of n channels of this dtype, and its argument `signs`."""
    split = factor(n)
    if split.order == 1:
        return None, False
    if split.kind == "hartley":
        return HadamardCore(split.order, str(device), torch.float64), False
    as_input = dtype.itemsize == 2 and split.order > 128  # it is kept in shared memory, not made in registers
    return HadamardCore(split.order, str(device), dtype if as_input else torch.int8), True


@dataclass(frozen=True)
class Signs(Expression):
    """The diagonal of a randomised Hadamard matrix: `length` numbers 1 or −1 that `seed` determines."""

    length: int
    seed: int
    dtype: torch.dtype
    device: str

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return torch.tensor(random_signs(self.length, self.seed), dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Hadamard(Expression):
    """x with dimension `dim` multiplied by the orthogonal H_n/√n of `hadamard.factor`, in float64, in x's dtype.

    block n: blocks of n along the dimension, each by itself; 0: the whole dimension. H is symmetric, so that this is
    x·H and x·Hᵀ alike, and twice the same is x again. It takes n·log n steps, not n².
    """

    x: Expression
    dim: int
    block: int = 0

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        x = values[0]
        split = factor(self.block or x.shape[self.dim])
        dense = core(split.order, x.device) if split.order > 1 else None
        return hadamard(x.movedim(self.dim, -1).double(), dense, split.n).to(x.dtype).movedim(-1, self.dim).contiguous()


@dataclass(frozen=True)
class Quantize(Expression):
    """Several tensors: codes, scale and, where the scheme has them, zero and outer. Pick one with `Output`."""

    x: Expression
    scheme: Scheme

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return self.scheme.quantize(values[0])


@dataclass(frozen=True)
class HalfQuadratic(Quantize):
    """The same by half-quadratic splitting (`half_quadratic.py`)."""

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        groups, grid = self.scheme.grid(values[0])
        scale, zero = half_quadratic(groups, grid, self.scheme.narrowed(values[0]))
        return self.scheme.stored(values[0], grid, grid.codes(groups, scale, zero), scale, zero)


@dataclass(frozen=True)
class Decided(Expression):
    """What `Quantize` returns, chosen by a plan for the weight x alone; another weight is refused.

    probe: `probe(x)` of the weight that the codes were chosen for.
    """

    x: Expression
    codes: Planned
    scale: Planned
    zero: Planned | None
    probe: tuple[float, float]

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        x, *found = values
        _check_weight(self, x, "codes were chosen")
        return dict(zip(("codes", "scale", "zero"), found, strict=False))


@dataclass(frozen=True)
class Range(Expression):
    """The ranges that training a weight of `scheme` starts from (`formats/learned.py`): float32 [..., n / group].

    A module that is trained has a parameter of its own in the place of this.
    """

    x: Expression
    scheme: Scheme

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        groups = values[0].unflatten(-1, (-1, self.scheme.group_of(values[0].shape[-1])))
        return initial_range(groups, self.scheme.of.element).squeeze(-1)


@dataclass(frozen=True)
class Steps(Expression):
    """What training a site's thresholds starts from (`ops/staircase.py`), for values up to 1: float32 [2^bits + 2].

    A module that is trained has a parameter of its own in the place of this.
    """

    site: str
    bits: int
    device: str

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return torch.tensor(begun(self.bits, 1.0, True), device=self.device)


@dataclass(frozen=True)
class Fitted(Expression):
    """A planned tensor that was fitted to the weight x alone; another weight is refused.

    probe: `probe(x)` of the weight that it was fitted to.
    """

    x: Expression
    value: Planned
    probe: tuple[float, float]

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        x, value = values
        _check_weight(self, x, "low-rank factors were fitted")
        return value


def _check_weight(expression: Decided | Fitted, x: torch.Tensor, what: str) -> None:
    """Refuses a weight with other values than the plan was made for; fake ones have none."""
    is_real = type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type != "meta"
    if is_real and not same_weight(expression.probe, probe(x)):
        name = next(iter(expression.parameters()), "a constant")
        raise UserError(
            f"the plan's {what} for other values of '{name}'",
            ["it was trained or replaced since, or this is another model of the same sizes"],
            "analyse this model: fuseline.analyze(model, pipeline, calibration=batches)",
        )


@dataclass(frozen=True)
class Output(Expression):
    """One of several tensors."""

    x: Expression
    name: str

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return values[0][self.name]


def rounding_in(expression: Expression) -> Quantize | None:
    """The rounding that an expression's codes, scales or zero points come from; None where it has none of them."""
    made = (part.x for part in expression.walk() if isinstance(part, Output))
    return next((x for x in made if isinstance(x, Quantize)), None)


@dataclass(frozen=True)
class Pack(Expression):
    """Codes in the memory layout of `scheme`."""

    x: Expression
    scheme: Scheme

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return self.scheme.pack(values[0])


@dataclass(frozen=True)
class InWords(Expression):
    """Packed codes [rows, …] of n channels laid out in runs of `run` words, as kernels read them (`formats/words.py`).

    `restored` gives the packed codes back, so that nothing has to keep both.
    """

    codes: Expression
    scheme: Scheme
    rows: int
    n: int
    run: int

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        return Words(self.scheme.bits, self.run).pack(as_bits(self.scheme.unpack(values[0], self.n)))

    def restored(self, value: torch.Tensor) -> torch.Tensor:
        bits = Words(self.scheme.bits, self.run).unpack(value, self.rows, self.n)
        return self.scheme.pack(as_stored(bits, self.scheme.element.stored))


@dataclass(frozen=True)
class Dequantize(Expression):
    """Packed codes expanded to floating point, as `fuseline::dequantize` does."""

    codes: Expression
    scale: Expression
    zero: Expression | None
    bits: int
    group: int
    dtype: torch.dtype

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        codes, scale, *zero = values
        return dequantize.naive(codes, scale, zero[0] if zero else None, self.bits, self.group, self.dtype)


@dataclass(frozen=True)
class Decode(Expression):
    """Codes of any number format expanded to floating point, as `fuseline::decode` does."""

    codes: Expression
    scale: Expression
    zero: Expression | None
    outer: Expression | None
    format: str
    group: int
    packed: bool
    dtype: torch.dtype

    def compute(self, values: list[Any], lookup: Lookup) -> Any:
        codes, scale, *rest = values
        zero, outer = (rest.pop(0) if given is not None else None for given in (self.zero, self.outer))
        return decode.naive(codes, scale, zero, outer, self.format, self.group, self.packed, self.dtype)


GRAMMAR: dict[str, type[Expression]] = {
    kind.__name__.lower(): kind
    for kind in (
        Param, Constant, Cast, Matmul, Scale, Add, Offset, Centre, Slice, Concat, Transpose, Reshape, HadamardCore,
        Signs, Hadamard, Orthogonal, Planned, Blocks, Quantize,
        HalfQuadratic, Decided, Fitted, Range, Steps, Output, Pack, InWords, Dequantize, Decode,
    )
}  # fmt: skip


def _encode(value: Any) -> Any:
    if isinstance(value, Expression):
        return value.to_json()
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Scheme):
        return {"scheme": str(value)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if isinstance(value, dict):
        if "op" in value:  # an operand, whose own fields may be called dtype or scheme
            return Expression.from_json(value)
        return getattr(torch, value["dtype"]) if "dtype" in value else Scheme.parse(value["scheme"], weights=True)
    return value
