"""Launching Triton kernels at a low cost on the host, from binaries that are kept on disk.

`wrap(module)` puts a `KernelLauncher` in the place of each `@triton.jit` function of a generated module. A launch reads
the kernel's specialisation off its arguments (types, alignment to 16 bytes, integers that are 1 or divisible by 16,
constants), all in C loops, and calls the compiled kernel's C launcher with addresses. A specialisation that is met for
the first time comes from the cache on disk, or is compiled and put there (`specialisation.py`). What the launcher
doesn't understand is launched by Triton itself, with the same result: another version of Triton, its debugging
variables, launch hooks, kernels that want scratch memory, arguments on several devices.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import repeat
from operator import attrgetter, or_
from types import ModuleType
from typing import Any

import torch

from ..compiler.early_launch import CONSTANT
from . import dependent, triton_api
from .kernel_store import KernelStore
from .specialisation import Specialisation, prepare

log = logging.getLogger("fuseline")
ALIGNMENT = 16  # bytes; what Triton specialises pointers by
address, device_index, dtype_of = torch.Tensor.data_ptr, torch.Tensor.get_device, attrgetter("dtype")


@dataclass(frozen=True)
class Ready:
    """A kernel compiled for one kind of arguments, loaded on one device; `constants` come after the arguments."""

    launch: Any
    head: tuple[Any, ...]
    constants: tuple[Any, ...]
    device: int


class KernelLauncher:
    """Stands for a `@triton.jit` function: `kernel[grid](*arguments, BLOCK=…, num_warps=…, num_stages=…)`.

    Arguments that are no constants are given by position, tensors first, as generated modules do; the constant
    DEPENDENT is the launcher's own to choose (`dependent.py`). Everything else the function has (`warmup`, `fn`, …) is
    its own.
    """

    def __init__(self, function: Any, store: KernelStore):
        self.function, self.store = function, store
        self.known: dict[tuple[Any, ...], Ready | None] = {}  # None: launched by Triton
        self.count = self.pointers = -1  # of the arguments: how many there are, how many are tensors
        self.plain = False  # whether Triton launches this kernel whatever its arguments
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __getitem__(self, grid: Any) -> Any:
        return partial(self._launch, grid)

    def __repr__(self) -> str:
        return f"KernelLauncher({self.function.__name__})"

    def _launch(self, grid: Any, /, *arguments: Any, **constants: Any) -> None:
        if len(arguments) != self.count and not self._begin(arguments):
            return self.function[grid](*arguments, **constants)
        pointers, scalars, runtime = arguments[: self.pointers], arguments[self.pointers :], self._runtime
        try:
            addresses = tuple(map(address, pointers))
            devices = tuple(map(device_index, pointers))
            types = tuple(map(self._specialise, repeat(self._backend), scalars, repeat(False), *self._flags))
        except (TypeError, OverflowError):  # not the kinds of arguments that the first call had
            return self.function[grid](*arguments, **constants)
        aligned = not reduce(or_, addresses) % ALIGNMENT or tuple(a % ALIGNMENT == 0 for a in addresses)
        values, early = constants.values(), self._dependent and dependent.early(grid)
        key = (early, aligned, *devices, *map(dtype_of, pointers), *types, *constants, *values, *map(type, values))
        try:
            ready = self.known[key]
        except KeyError:
            ready = self._first_time(key, pointers, addresses, devices, types, constants, early)
        if ready is None or type(grid) is not tuple or _hooked(runtime):
            return self.function[grid](*arguments, **constants)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        device, driver = ready.device, self._driver
        if driver.get_current_device() == device:
            stream = driver.get_current_stream(device)
            ready.launch(x, y, z, stream, *ready.head, *addresses, *scalars, *ready.constants)
        else:
            with torch.cuda.device(device):
                stream = driver.get_current_stream(device)
                ready.launch(x, y, z, stream, *ready.head, *addresses, *scalars, *ready.constants)

    def _begin(self, arguments: Sequence[Any]) -> bool:
        """Learns from the first call which arguments are tensors; False where Triton launches this kernel."""
        if self.plain or self.count >= 0:
            return False
        params = self.function.params[: len(arguments)]
        tensors = [isinstance(a, torch.Tensor) for a in arguments]
        pointers = sum(tensors)
        if pointers == 0 or not all(tensors[:pointers]) or not _understood(self.function, params):
            self.plain = True
            return False
        from triton import knobs

        self._runtime, self._driver = knobs.runtime, triton_api.driver()
        self._specialise = triton_api.specialiser()
        target, names = self._driver.get_current_target(), [p.name for p in self.function.params]
        self._backend = triton_api.backend(target)
        self._may_depend = CONSTANT in names
        self._dependent = self._may_depend and dependent.possible(target.backend, target.arch)
        flags = [(not p.do_not_specialize, not p.do_not_specialize_on_alignment) for p in params[pointers:]]
        self._flags = tuple(zip(*flags)) or ((), ())
        self.pointers, self.count = pointers, len(arguments)
        return True

    def _first_time(
        self,
        key: tuple[Any, ...],
        pointers: Sequence[torch.Tensor],
        addresses: Sequence[int],
        devices: Sequence[int],
        types: Sequence[tuple[str, Any]],
        constants: dict[str, Any],
        early: bool,
    ) -> Ready | None:
        """The kernel for arguments like these, loaded. None where Triton has to launch it, for good."""
        with self._lock:
            if key not in self.known:
                self.known[key] = None
                if min(devices) == max(devices) >= 0:  # otherwise Triton says what is wrong
                    params = self.function.params
                    skipped = [p.do_not_specialize or p.do_not_specialize_on_alignment for p in params]
                    kinds = [
                        (f"*{dtype}", "D" if a % ALIGNMENT == 0 and not skip else "")
                        for dtype, a, skip in zip(map(self._pointee, pointers), addresses, skipped)
                    ]
                    if self._may_depend:
                        constants = {**constants, **dependent.constants(early)}
                    made = Specialisation.of(self.function, (*kinds, *types), constants)
                    self.known[key] = self._ready(made, devices[0]) if made else None
            return self.known[key]

    def _pointee(self, tensor: torch.Tensor) -> str:
        """Triton's name of a tensor's type."""
        return self._specialise(self._backend, tensor, False, False, False)[0].removeprefix("*")

    def _ready(self, made: Specialisation, device: int) -> Ready | None:
        try:
            with torch.cuda.device(device):
                loaded = prepare(made, self._driver.get_current_target(), self.store)
        except Exception as error:  # Triton's launch either works, or raises what the user should see
            log.debug("kernel %s is launched by Triton: %s: %s", made.name, type(error).__name__, error)
            return None
        return Ready(loaded.launch, loaded.head, tuple(made.given.values()), device) if loaded else None


def _hooked(runtime: Any) -> bool:
    """Whether a profiler, say, wants to see each launch."""
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:  # a function, or None, in the place of Triton's list
        return runtime.launch_enter_hook is not None or runtime.launch_exit_hook is not None


def _understood(function: Any, params: Sequence[Any]) -> bool:
    """Whether a function's compilation depends on its text, its arguments and its options alone."""
    annotated = any(p.annotation for p in params)  # "const", or a type that overrides the argument's
    return not (annotated or function.pre_run_hooks or function.debug or triton_api.plain_mode())


def wrap(module: ModuleType, store: KernelStore | None = None) -> ModuleType:
    """Puts launchers in the place of a module's kernels, and returns it; once done it changes nothing.

    Under Triton's interpreter, with a Triton whose inner workings are others, or on AMD's GPUs all stays as it is.
    """
    reason = triton_api.unlike()
    if reason is not None or torch.version.hip is not None:
        log.debug("kernels of %s are launched by Triton: %s", module.__name__, reason or "a GPU of AMD")
        return module
    from triton.runtime.jit import JITFunction

    store = store or KernelStore()
    functions = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    mentioned = {name: triton_api.mentions(function) for name, function in functions.items()}
    called = set().union(*mentioned.values())
    for name, function in functions.items():
        if not mentioned[name] and name not in called:  # its text is all of it, and no other kernel's text
            setattr(module, name, KernelLauncher(function, store))
    return module
