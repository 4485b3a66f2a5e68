"""A kernel for one kind of arguments: what is compiled, kept on disk and loaded on a device."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import triton_api
from .about import about
from .kernel_store import KernelStore

log = logging.getLogger("fuseline")
OPTIONS = {"num_warps", "num_stages", "launch_pdl"}


@dataclass(frozen=True)
class Specialisation:
    """A `@triton.jit` function with its arguments' types settled.

    signature: argument → Triton type, "constexpr" for constants; divisible: arguments that are multiples of 16;
    given: the constants that the caller passed, in the order of the parameters; ones: arguments that are constants
    because they are 1 (or None).
    """

    function: Any
    signature: dict[str, str]
    divisible: tuple[str, ...]
    given: dict[str, Any]
    ones: dict[str, Any]
    options: dict[str, int]

    @classmethod
    def of(cls, function: Any, types: Sequence[tuple[str, Any]], constants: Mapping[str, Any]) -> Specialisation | None:
        """
        Args:
            types: of the arguments before the constants, as Triton's specialiser answers.
            constants: constexpr parameters, exactly the remaining ones, and options.

        Returns:
            None for a call of another form: it is Triton's to launch.
        """
        names = [p.name for p in function.params]
        before, rest = names[: len(types)], names[len(types) :]
        options = {k: v for k, v in constants.items() if k not in rest}
        plain = all(type(v) in (int, bool) for v in constants.values())  # a float's key would be 0.0 == -0.0
        if not plain or set(rest) != constants.keys() - options.keys() or not options.keys() <= OPTIONS:
            return None
        if not all(p.is_constexpr for p in function.params[len(types) :]):
            return None
        signature = {name: kind for name, (kind, _) in zip(before, types)} | dict.fromkeys(rest, "constexpr")
        divisible = tuple(name for name, (_, what) in zip(before, types) if what == "D")
        ones = {name: what for name, (kind, what) in zip(before, types) if kind == "constexpr"}
        return cls(function, signature, divisible, {name: constants[name] for name in rest}, ones, options)

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def constants(self) -> dict[str, Any]:
        return {**self.ones, **self.given}

    def made_of(self, target: Any) -> dict[str, Any]:
        """The arguments of `KernelStore.load` and `save`."""
        return {
            "source": self.function.src,
            "signature": self.signature,
            "divisible": self.divisible,
            "constants": self.constants,
            "options": self.options,
            "target": (target.backend, target.arch),
        }


def prepare(made: Specialisation, target: Any, store: KernelStore) -> triton_api.Loaded | None:
    """Loads the kernel on the current device, from the store or compiled; None where it wants more than arguments.

    Raises what Triton does for a kernel that it cannot compile or load.
    """
    source = triton_api.source(made.function, made.signature, made.constants, made.divisible)
    key = made.made_of(target)
    files = store.load(made.name, **key)
    if files is not None:
        try:
            return triton_api.load(triton_api.restore(source, files, target))
        except Exception as error:  # whole, but not fit for this Triton
            log.debug("the stored kernel %s cannot be loaded: %s: %s", made.name, type(error).__name__, error)
    compiled = triton_api.build(source, target, made.options)
    store.save(made.name, triton_api.files_of(compiled), files is not None, about(made.function), **key)
    return triton_api.load(compiled)
