"""The module that is trained: a model's forward with rounding in its graph, and ranges among its parameters."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from ..calibrate import Call
from ..compiler.capture import capture
from ..compiler.errors import CaptureError, UserError
from ..compiler.expressions import Expression, Param, Reshape, Steps, Transpose
from ..compiler.flatten import flatten
from ..compiler.ops import fake_quantize, fake_staircase, round_through
from ..compiler.ops.staircase import begun
from ..compiler.pipeline import Pipeline
from ..compiler.program import TRAINS, Program
from ..compiler.report import Report
from ..passes.quantize_training import Trained, trained

KEPT = (fake_quantize.name, round_through.name, fake_staircase.name)
"""Dialect ops that training runs as they are; others are written out in ATen, whose derivatives are its own."""


@dataclass(frozen=True)
class Rounded:
    """A weight that training rounds.

    at: its sites, module path and ordinal each; one: the expression of the matrix [out, in], its scheme and method;
    key: of its ranges in `QuantizationAware.ranges`, None where they are taken from the weight at each step.
    """

    at: tuple[str, ...]
    one: Trained
    key: str | None


class QuantizationAware(torch.nn.Module):
    """A model as `prepare_qat` makes it: called, moved, saved and trained as any module.

    model: the one that it was made from, whose parameters are trained in place. ranges: the learned ranges, one
    float32 parameter [out, in / group] a weight, by the weight's name, and thresholds, by their site's. `state_dict()`
    holds both.

    noise: of the rounded weights in training, as a part of each one's root mean square (`WinQ`). gradients: of weights
    that are computed from parameters, what becomes of the gradient, given the weight (`ConfidenceAnnealing`).

    In `train()` mode the graph is the model's in that mode, with its dropout, unless it was made without; else the one
    that it has in `eval()`.
    """

    def __init__(self, model: torch.nn.Module, pipeline: Pipeline, call: Call, dynamic: Any, dropout: bool):
        super().__init__()
        self.model, self.pipeline = model, pipeline
        self.ranges = torch.nn.ParameterDict()
        self.report = Report(str(pipeline))
        self._call, self._dynamic, self._dropout = call, dynamic, dropout
        self._graphs: dict[bool, Callable[..., Any]] = {}  # no submodules: they hold the model's own parameters
        self._leaves: dict[Expression, str] = {}
        self._placed: set[Expression] = set()
        self.rounded: tuple[Rounded, ...] = ()
        self.noise = 0.0
        self.gradients: dict[Expression, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}
        self.train(model.training)
        self._graph()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Of the arguments that the model takes, laid out as in the example."""
        return self._graph()(*args, **kwargs)

    def weight(self, rounded: Rounded) -> torch.Tensor:
        """A rounded weight before it is rounded, [out, in]: the parameter itself, unless another pass folds it."""
        value: torch.Tensor = rounded.one.weight.evaluate(self._parameter)
        return value

    def editable(self, rounded: Rounded) -> tuple[torch.nn.Parameter, torch.Tensor]:
        """The parameter that a rounded weight is, and the matrix [out, in] as a view of it, to be edited in place.

        Raises:
            UserError: the weight is computed from parameters.
        """
        owner, view = self._owner(rounded)
        if view is None or not isinstance(owner, torch.nn.Parameter):
            raise UserError(
                f"the weight of {rounded.at[0]} is computed from {', '.join(rounded.one.weight.parameters())}",
                ["an optimizer that edits weights in place finds no such parameter"],
                "drop the pass that computes it, or use method=paretoq",
            )
        return owner, view

    def is_computed(self, rounded: Rounded) -> bool:
        """Whether a rounded weight is no parameter, nor a view of one."""
        return self._owner(rounded)[1] is None

    def _owner(self, rounded: Rounded) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        names = rounded.one.weight.parameters()
        owner = self._parameter(names[0]) if len(names) == 1 else None
        return owner, None if owner is None else as_matrix(rounded.one.weight, owner.detach())

    def range(self, rounded: Rounded) -> torch.Tensor:
        """The ranges of a weight whose method has any of its own."""
        assert rounded.key is not None
        return self.ranges[rounded.key]

    def thresholds(self) -> dict[str, tuple[torch.Tensor, int]]:
        """The steps of learned thresholds, and their bits, by the site that reads between them first."""
        return {e.site: (self.ranges[key], e.bits) for e, key in self._leaves.items() if isinstance(e, Steps)}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizationAware:
        """`to()`, `cuda()`, `bfloat16()` and the like end here: graphs are made again where something moved."""
        kinds = lambda: [(p.device, p.dtype) for p in self.model.parameters()]
        before = kinds()
        super()._apply(fn, recurse)
        if kinds() != before:
            self._graphs.clear()
            devices = {p.device for p in self.model.parameters()}
            if len(devices) == 1:
                (device,) = devices
                self._call = pytree.tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, self._call)
        return self

    def _parameter(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        found: torch.Tensor = getattr(self.model.get_submodule(path), leaf)
        return found

    def _graph(self) -> Callable[..., Any]:
        mode = self.training and self._dropout
        if mode not in self._graphs:
            self._graphs[mode] = self._captured(mode)
        return self._graphs[mode]

    def _captured(self, mode: bool) -> Callable[..., Any]:
        """The graph of one mode, with a parameter for each range that no graph had before.

        Raises:
            CaptureError: the model is not one graph in this mode.
        """
        modes = {module: module.training for module in self.model.modules()}
        self.model.train(mode)
        try:
            args, kwargs = self._call
            program = capture(self.model, args, kwargs, self._dynamic)
        except CaptureError as error:
            remedy = (
                "prepare_qat(…, dropout=False) trains the graph that the model has in eval()" if mode else error.remedy
            )
            raise CaptureError(error.headline, error.details, remedy) from error
        finally:
            for module, was in modes.items():
                module.training = was
        program = replace(program, training=True, state=program.state | {TRAINS})
        chosen = Pipeline([step for step in self.pipeline.passes if step.name != "fuse"])
        program, self.report = chosen.run(program)
        self._add_ranges(program)
        return self._runnable(program)

    def _add_ranges(self, program: Program) -> None:
        sites: dict[Expression, list[Trained]] = {}
        for one in trained(program):
            sites.setdefault(one.weight, []).append(one)
        found = []
        for weight, ones in sites.items():
            first = ones[0]
            if any((one.scheme, one.method) != (first.scheme, first.method) for one in ones):
                raise UserError(
                    f"one weight is rounded in two ways: {weight.parameters()[0]}",
                    [f"{one.site}: {one.scheme}, {one.method.value}" for one in ones],
                    "give its sites one scheme",
                )
            found.append(Rounded(tuple(one.site for one in ones), first, self._key(first)))
        self.rounded = tuple(found)
        for node in program.weights():
            if not isinstance(steps := node.meta["weight"], Steps) or steps in self._leaves:
                continue
            elsewhere = [
                e for e in self._leaves if isinstance(e, Steps) and (e.site, e.bits) == (steps.site, steps.bits)
            ]
            if elsewhere:  # on another device
                self._leaves[steps] = self._leaves[elsewhere[0]]
                self._placed.add(steps)
            else:
                self._leaf(steps, f"{steps.site} thresholds", steps.evaluate(self._parameter), True)

    @torch.no_grad()
    def _key(self, one: Trained) -> str | None:
        if one.range is None:
            return None
        if one.range not in self._leaves:
            name = next(iter(one.weight.parameters()), "constant")
            # An optimizer that sets ranges itself (PARQ) wants no gradient for them.
            self._leaf(one.range, name, one.range.evaluate(self._parameter), one.method.value == "paretoq")
        return self._leaves[one.range]

    def _leaf(self, expression: Expression, name: str, start: torch.Tensor, trained: bool) -> None:
        """A parameter in the place of an expression."""
        key = re.sub(r"\W", "_", name)
        while key in self.ranges:
            key += "_"
        self.ranges[key] = torch.nn.Parameter(start, requires_grad=trained)
        self._leaves[expression] = key

    def _runnable(self, program: Program) -> Callable[..., Any]:
        module, expressions = program.lift()
        graph = flatten(program, module, lambda op: op.name not in KEPT)
        sources, positions = program.sources, program.arguments
        constants: dict[Expression, torch.Tensor] = {}
        noisy = {one.weight for one in trained(program)}

        def run(*flat: Any) -> Any:
            lookup = lambda name: flat[sources[name].index]
            memo: dict[Expression, Any] = dict(constants)
            memo.update({leaf: self.ranges[key] for leaf, key in self._leaves.items()})
            weights = [expression.evaluate(lookup, memo) for expression in expressions]
            for i, expression in enumerate(expressions):
                if not expression.parameters() and expression not in self._leaves:
                    constants[expression] = weights[i]
                    continue
                if (changed := self.gradients.get(expression)) is not None and weights[i].requires_grad:
                    weights[i].register_hook(partial(changed, weights[i].detach()))
                if self.noise and self.training and expression in noisy:
                    weights[i] = _with_noise(weights[i], self.noise)
            return graph(*[flat[i] for i in positions], *weights)

        assert program.call is not None
        captured = program.call(run)
        if unplaced := [e for e in expressions if isinstance(e, Steps) and e not in self._placed]:
            self._place(program, graph, expressions, unplaced)
        return captured

    @torch.no_grad()
    def _place(
        self, program: Program, graph: GraphModule, expressions: list[Expression], unplaced: list[Expression]
    ) -> None:
        """Sets thresholds evenly over what the sites read in the example, one after another."""
        assert program.examples is not None
        flat = list(program.examples)
        lookup = lambda name: flat[program.sources[name].index]
        memo: dict[Expression, Any] = {leaf: self.ranges[key] for leaf, key in self._leaves.items()}
        steps = {id(memo[e]): e for e in unplaced}

        class Placing(torch.fx.Interpreter):
            def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if target is fake_staircase.overload and id(args[1]) in steps:
                    signed = bool((args[0] < 0).any())
                    args[1].copy_(torch.tensor(begun(args[2], args[0].abs().max().item(), signed)))
                return super().call_function(target, args, kwargs)

        weights = [expression.evaluate(lookup, memo) for expression in expressions]
        Placing(graph).run(*[flat[i] for i in program.arguments], *weights)
        self._placed.update(unplaced)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizationAware:
        """A copy with a model of its own; graphs are made again, for they hold the parameters' owners."""
        twin = QuantizationAware(
            copy.deepcopy(self.model, memo), self.pipeline, self._call, self._dynamic, self._dropout
        )
        twin.load_state_dict(self.state_dict())
        return twin.train(self.training)

    def __getstate__(self) -> Any:
        raise UserError(
            "a module of prepare_qat is not pickled",
            remedy="torch.save(qat.state_dict(), PATH), and load_state_dict into prepare_qat of the same model",
        )


def as_matrix(weight: Expression, value: torch.Tensor) -> torch.Tensor | None:
    """A tensor of the shape of a weight's one parameter as the weight's matrix, a view of it; None where it is none."""
    if isinstance(weight, Param):
        return value
    if not isinstance(weight, (Transpose, Reshape)) or (inner := as_matrix(weight.x, value)) is None:
        return None
    if isinstance(weight, Transpose):
        return inner.transpose(weight.first, weight.second)
    view = inner.reshape(weight.shape)
    return view if view.data_ptr() == inner.data_ptr() else None


def _with_noise(weight: torch.Tensor, part: float) -> torch.Tensor:
    size = weight.detach().square().mean().sqrt()
    return weight + part * size * torch.randn_like(weight)
