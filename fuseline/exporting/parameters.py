"""From what the rewritten graph reads at each place to the new value of each of the model's parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..compiler.errors import UserError
from ..compiler.expressions import Expression, Output, Param
from ..compiler.program import Program
from ..compiler.weights import STORE, describe
from .unify import Mismatch, Neutral, Unified, Use

Value = Expression | Neutral

ELSEWHERE = "--format compressed-tensors has codes and scales; fuseline.save keeps any model, for fuseline.load"


@dataclass
class Assignment:
    """What becomes of a model's parameters and buffers, by the names in its state dict.

    values: those that change; untied: those of them whose twin under another name gets another value; unread: those
    that the graph never read, which are copied as they are; config: numbers of the configuration that change.
    """

    program: Program
    values: dict[str, Value] = field(default_factory=dict)
    untied: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)
    config: dict[str, int] = field(default_factory=dict)

    def evaluate(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The new value, computed in float64 where it folds algebra, in the parameter's dtype."""
        value = self.values[name]
        if isinstance(value, Neutral):
            return torch.full_like(like, value.value)
        tensors = [self.program.sources[n].tensor.detach() for n in value.parameters()]
        return STORE.peek(value, tensors)


def assign(model: torch.nn.Module, program: Program, uses: Sequence[Use]) -> Assignment:
    """Solves for the parameters of `model`.

    program: the captured one, whose sources are the model's tensors.

    Raises:
        Mismatch: two places want different values of one parameter, or of something derived from one.
    """
    found = Assignment(program)
    stored = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in stored.items():
        names[id(tensor)].append(name)
    read: set[int] = set()
    wanted: dict[str, dict[Value, list[Use]]] = defaultdict(dict)
    for use in uses:
        if not use.weight.parameters() and use.value != use.weight:
            raise Mismatch(f"the passes changed a tensor that the model's code writes down, read at {use.site}")
        for parameter in use.weight.parameters():
            read.add(id(program.sources[parameter].tensor))
            value = use.value
            if not isinstance(use.weight, Param):
                if use.value != use.weight:
                    raise Mismatch(
                        f"'{parameter}' is read at {use.site} only through {describe(use.weight)}",
                        [f"and the passes put {_text(use.value)} in the place of that"],
                    )
                value = Param(parameter)  # as it is
            wanted[parameter].setdefault(value, []).append(use)
    for parameter, values in wanted.items():
        if list(values) == [Param(parameter)]:
            continue
        aliases = names.get(id(program.sources[parameter].tensor), [])
        if not aliases:
            raise Mismatch(
                f"'{parameter}' gets another value at {_first(values)}, and no checkpoint of {type(model).__name__} "
                "holds it"
            )
        if len(values) == 1:
            found.values.update(dict.fromkeys(aliases, next(iter(values))))
        else:
            _split(found, parameter, aliases, values)
    found.values = {name: found.values[name] for name in stored if name in found.values}
    found.unread = [n for n, t in stored.items() if id(t) not in read and isinstance(t, torch.nn.Parameter)]
    return found


def _split(found: Assignment, parameter: str, aliases: list[str], values: dict[Value, list[Use]]) -> None:
    """One tensor under several names, each of which gets the value that is read in the module that owns it."""
    owners = {alias.rpartition(".")[0]: alias for alias in aliases}
    chosen: dict[str, set[Value]] = defaultdict(set)
    for value, uses in values.items():
        for use in uses:
            if use.module not in owners:
                raise _twice(parameter, values)
            chosen[owners[use.module]].add(value)
    if chosen.keys() != set(aliases) or any(len(v) > 1 for v in chosen.values()):
        raise _twice(parameter, values)
    for alias, (value,) in chosen.items():
        if value != Param(parameter):
            found.values[alias] = value
        found.untied.add(alias)


def _twice(parameter: str, values: dict[Value, list[Use]]) -> Mismatch:
    return Mismatch(
        f"'{parameter}' is read in several places, and the passes want different values of it",
        [f"{uses[0].site}: {_text(value)}" for value, uses in values.items()],
    )


def _first(values: dict[Value, list[Use]]) -> str:
    return next(use.site for value, uses in values.items() for use in uses if not isinstance(value, Param))


def _text(value: Value) -> str:
    return f"{value.value:g} everywhere" if isinstance(value, Neutral) else describe(value)


def refuse_quantized(program: Program) -> None:
    """Refuses a graph with quantized weights, which format 'hf' cannot hold.

    Raises:
        Mismatch: naming a weight and its scheme.
    """
    for node in program.weights():
        for part in node.meta["weight"].walk():
            if isinstance(part, Output):
                scheme = getattr(part.x, "scheme", None)
                raise Mismatch(
                    f"'{node.meta['weight'].parameters()[0]}' is quantized ({scheme}), and a plain checkpoint has no "
                    "place for codes and scales",
                    [ELSEWHERE],
                )


def refuse_rounding(unified: Unified) -> None:
    """Refuses values that are rounded at run time, of which format 'hf' cannot tell.

    Raises:
        Mismatch: naming a place.
    """
    sites = [*(one.site for one in unified.inputs), *(one.site for one in unified.caches)]
    if sites:
        raise Mismatch(
            f"values are rounded at run time at {sites[0]}, of which a plain checkpoint says nothing", [ELSEWHERE]
        )


def check_split(model: torch.nn.Module, names: set[str]) -> None:
    """Holds a model that was built without ties to that.

    Raises:
        UserError: two of the names are still one parameter.
    """
    first: dict[int, str] = {}
    for name in sorted(names):
        other = first.setdefault(id(model.get_parameter(name)), name)
        if other != name:
            raise UserError(
                f"{type(model).__name__} ties '{name}' to '{other}' even with tie_word_embeddings=False, and they get "
                "different values",
                remedy="a pipeline without untie",
            )
