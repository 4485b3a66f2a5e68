"""Everything here that rests on Triton's inner workings: how it specialises, compiles, loads and launches a kernel.

Checked with the versions below. `unlike()` probes for what is used, so that another version either has it all or gets
plain `@triton.jit` launches: slower on the host, the same results.
"""

from __future__ import annotations

import errno
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .location import temporary, warn_once

CHECKED_VERSIONS = ("3.6",)
# What the C launcher takes before the kernel's own arguments: the grid, stream and function, two flags, two scratch
# buffers, metadata for the launch and for the hooks, two hooks.
_BASE_ARGUMENTS = "iiiKKppOOOOOO"
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENOENT)
# How arguments are specialised: value → (type, specialisation).
_ANSWERS = {1: ("constexpr", 1), 16: ("i32", "D"), 17: ("i32", ""), 1 << 33: ("i64", "D"), 1.5: ("fp32", None)}


@dataclass(frozen=True)
class Loaded:
    """A kernel on a device: launch(x, y, z, stream, *head, *arguments) with every argument, constants included.

    Pointers may be given as addresses.
    """

    launch: Callable[..., None]
    head: tuple[Any, ...]


@cache
def unlike() -> str | None:
    """Why this Triton's kernels are launched plainly, or None."""
    try:
        return _unlike()
    except Exception as error:  # a module or a name that is not there
        return f"{type(error).__name__}: {error}"


def _unlike() -> str | None:
    from triton import knobs
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend
    from triton.backends.nvidia import driver
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction, KernelParam

    if knobs.runtime.interpret:
        return "Triton is in interpreter mode"
    if driver._BASE_ARGS_FORMAT != _BASE_ARGUMENTS:
        return f"its launcher takes {driver._BASE_ARGS_FORMAT}"
    if list(inspect.signature(CompiledKernel.__init__).parameters) != ["self", "src", "metadata_group", "hash"]:
        return "CompiledKernel is made in another way"
    names = set(driver.CudaLauncher.__init__.__code__.co_names)
    used = {"launch", "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl"}
    if not used <= names:
        return f"CudaLauncher has no {', '.join(sorted(used - names))}"
    for name in ("do_not_specialize", "do_not_specialize_on_alignment"):
        if name not in inspect.signature(KernelParam.__init__).parameters:
            return f"KernelParam has no {name}"
    if not {"params", "pre_run_hooks"} <= set(JITFunction.__init__.__code__.co_names):
        return "JITFunction has other attributes"
    for value, answer in _ANSWERS.items():
        if native_specialize_impl(BaseBackend, value, False, True, True) != answer:
            return f"it specialises {value} in another way"
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return None if all(isinstance(h.calls, list) for h in hooks) else "its launch hooks are no lists"


def plain_mode() -> bool:
    """Whether the user asked Triton for something that only its own launches do: dumps, overrides, hooks, checks."""
    from triton import knobs

    ask, run = knobs.compilation, knobs.runtime
    asked = ask.override, ask.dump_ir, ask.always_compile, ask.use_ir_loc, ask.listener, ask.instrumentation_mode
    return any((*asked, run.debug, run.jit_cache_hook, run.jit_post_compile_hook, run.add_stages_inspection_hook))


def mentions(function: Any) -> set[str]:
    """The globals that a `@triton.jit` function mentions, Triton's own modules apart."""
    codes, names = [function.fn.__code__], set()
    for code in codes:
        codes += [x for x in code.co_consts if inspect.iscode(x)]
        names |= {name for name in code.co_names if name in function.__globals__}
    values = {name: function.__globals__[name] for name in names}
    return {n for n, x in values.items() if not (inspect.ismodule(x) and x.__name__.partition(".")[0] == "triton")}


def driver() -> Any:
    """Triton's driver of the GPU: `get_current_device`, `get_current_stream`, `get_current_target`."""
    from triton.runtime.driver import driver as configured

    return configured.active


def specialiser() -> Callable[..., tuple[str, Any]]:
    """f(backend, value, is_const, specialise, align) → (type, "D" where divisible by 16, or what a constant is)."""
    from triton._C.libtriton import native_specialize_impl

    return native_specialize_impl


def backend(target: Any) -> Any:
    from triton.compiler.compiler import make_backend

    return make_backend(target)


def source(function: Any, signature: Mapping[str, str], constants: Mapping[str, Any], divisible: Sequence[str]) -> Any:
    """What Triton compiles: a function whose arguments' types, constants and divisibility by 16 are settled."""
    from triton.compiler import ASTSource

    order = list(signature)
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in divisible}
    return ASTSource(function, dict(signature), dict(constants), attributes)


def build(made: Any, target: Any, options: Mapping[str, Any]) -> Any:
    """Compiles; where Triton's own cache cannot be written, in a folder of this process.

    Products fuse with sums, as was Triton's default up to 3.9, which warns where it is not asked for.
    """
    import triton

    options = {"enable_fp_fusion": True, **options}
    try:
        return triton.compile(made, target=target, options=options)
    except OSError as error:
        if error.errno not in _READ_ONLY or triton.knobs.cache.dir == str(temporary()):
            raise
        warn_once(Path(triton.knobs.cache.dir), error)
        triton.knobs.cache.dir = str(temporary())
        return triton.compile(made, target=target, options=options)


def files_of(compiled: Any) -> dict[str, bytes]:
    """What Triton left of a compilation, by the files' endings."""
    return {name.rpartition(".")[2]: Path(path).read_bytes() for name, path in compiled.metadata_group.items()}


def restore(made: Any, files: Mapping[str, bytes], target: Any) -> Any:
    """The compiled kernel that left `files`. Raises whatever they are not fit for."""
    from triton.compiler import CompiledKernel

    with tempfile.TemporaryDirectory(prefix="fuseline-") as folder:  # it reads everything at once, from paths
        group = {}
        for ending, content in files.items():
            path = Path(folder, f"{made.name[:150]}.{ending}")
            path.write_bytes(content)
            group[path.name] = str(path)
        compiled = CompiledKernel(made, group, "")
    compiled.hash = compiled.metadata.hash
    if compiled.metadata.target != target or compiled.metadata.name != made.name:
        raise ValueError(f"a kernel {compiled.metadata.name} for {compiled.metadata.target}")
    return compiled


def load(compiled: Any) -> Loaded | None:
    """Puts a compiled kernel on the current device; None where its launches need more than arguments."""
    run = compiled.run  # loads the binary; raises OutOfResources
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    head = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata)
    return Loaded(run.launch, (*head, None, None, None))
