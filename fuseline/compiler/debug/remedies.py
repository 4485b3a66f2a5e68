"""What to write instead of a line at which a graph broke.

Dynamo's messages say what it met, and hint at settings of its own; a remedy says what to do to the line. They are
found by Dynamo's message and the line's text together, the most particular first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_HINT = re.compile(r"^\s*Hint: (.*)$", re.MULTILINE)
_CONTEXT = re.compile(r"Developer debug context: (.*)")
_UNHELPFUL = re.compile(r"report an issue|file an issue|rare|likely to be a Dynamo bug", re.IGNORECASE)


@dataclass(frozen=True)
class Remedy:
    """A kind of graph break, and the way out. `message` is searched in Dynamo's text, `code` in the line."""

    kind: str
    advice: str
    message: str = ""
    code: str = ""

    def fits(self, message: str, code: str) -> bool:
        return bool(re.search(self.message, message, re.IGNORECASE) and re.search(self.code, code))


REMEDIES = (
    Remedy(
        "printing",
        "print behind `if not torch.compiler.is_compiling():`, or outside of forward; "
        "torch._dynamo.config.reorderable_logging_functions.add(print) moves it behind the graph",
        r"builtin operator `print`|`builtins?\.print`",
    ),
    Remedy(
        "logging",
        "log behind `if not torch.compiler.is_compiling():`, or outside of forward",
        r"logging\.Logger|logging function not supported|module: logging",
    ),
    Remedy(
        "warning",
        "warn in __init__, or behind `if not torch.compiler.is_compiling():`",
        r"(builtin|function) `_?warnings\.warn`|module: _?warnings\b",
    ),
    Remedy("breakpoint", "take the breakpoint out", r"breakpoint|pdb|set_trace"),
    Remedy(
        "clock",
        "measure around the call of the model: a compiled graph has no time of its own",
        r"module: (time|datetime)\b|the builtin `(time|datetime)\.",
    ),
    Remedy(
        "branch on a tensor",
        "torch.where(condition, a, b) computes both sides and keeps one; a loop runs a fixed number of steps, and "
        "torch.where keeps what is done",
        r"generic_jump|data-dependent (branching|jump|assertion)|dynamic control flow",
    ),
    Remedy(
        "comparison to a Python bool",
        "compare with tensors, (a == b).all(), and choose by torch.where, or compare outside of forward",
        r"aten\.(equal|allclose|is_nonzero)",
    ),
    Remedy(
        "tensor to Python number",
        "keep it a tensor: one without dimensions multiplies, adds and compares like a number; where Python must "
        "have it, torch._dynamo.config.capture_scalar_outputs = True",
        r"Tensor\.item\(\)|_local_scalar_dense|capture_scalar_outputs|Tensor\.__(int|float|bool|index)__",
    ),
    Remedy(
        "tensor to Python list",
        "keep it a tensor and index with it; a list that never changes is made once, in __init__",
        r"tolist\(\)|to_list",
    ),
    Remedy(
        "result of unknown size",
        "torch.where or a mask keeps the size; nonzero_static(size=n) and a padded top-k bound it; otherwise "
        "torch._dynamo.config.capture_dynamic_output_shape_ops = True",
        r"output shape depends on input Tensor data|Dynamic shape operator|dynamic_output_shape",
    ),
    Remedy(
        "numpy",
        "the same function of torch (np.cumsum → torch.cumsum): values stay on the device, gradients flow",
        r"numpy|ndarray",
    ),
    Remedy("numpy", "the same function of torch, or the call before forward", "", r"\b(np|numpy)\.|\.numpy\(\)"),
    Remedy(
        "disabled function",
        "take off @torch.compiler.disable, or call it before or after the model",
        r"torch\.compiler\.disable|was wrapped with `torch\.compiler\.disable`|_dynamo\.disable",
    ),
    Remedy(
        "custom autograd function",
        "ctx.save_for_backward and tensor operations only, in forward and backward; anything else belongs in a "
        "torch.library.custom_op with register_autograd",
        r"autograd\.Function|autograd_function|custom autograd",
    ),
    Remedy(
        "gradient inside forward",
        "torch.func.grad, or the backward pass outside of the model",
        r"Tensor\.backward\(\)|requires_grad=True|requires_grad_|autograd\.grad",
    ),
    Remedy(
        "deep copy",
        "x.clone() for a tensor; copy objects outside of forward",
        r"copy\.deepcopy|module: copy,",
    ),
    Remedy(
        "context manager",
        "a context manager of torch (no_grad, autocast), or @contextlib.contextmanager around plain Python; enter any "
        "other around the call of the model",
        r"context manager|with block|enter.*exit|GenericContextWrapping",
    ),
    Remedy(
        "generator",
        "a list or a for loop in its place: for a generator the whole function is left to Python",
        r"generator|yield",
    ),
    Remedy(
        "random numbers",
        "seed before the call; draw with torch.rand and its like",
        r"manual_seed|torch\.random|module: random|np\.random",
    ),
    Remedy(
        "files",
        "read and write files outside of forward; hand the values in or out as tensors",
        r"builtin operator `open`|TextIOWrapper|torch\.serialization|qualname: (save|load)\b|module: (io|os|pathlib)\b",
    ),
    Remedy(
        "address of a tensor",
        "a compiled graph owns its buffers: identify tensors by name or position, not by data_ptr()",
        r"data_?ptr",
    ),
    Remedy(
        "exception",
        "check inputs before the model, or torch._check(condition); try/except around tensor code cannot be traced",
        r"Observed exception|unhandled exception|try/except",
    ),
    Remedy(
        "recompilation limit",
        "find what changes between calls (a number, a length, an attribute) and pass it as a tensor, or raise "
        "torch._dynamo.config.recompile_limit",
        r"recompile_limit|cache_size_limit",
    ),
    Remedy(
        "C or C++ extension",
        "wrap it by torch.library.custom_op with register_fake, and it becomes one node of the graph",
        r"C/C\+\+|C extension|pybind|custom operator|cannot determine source file",
    ),
    Remedy(
        "skipped function",
        "call it before or after the model, or mark it @torch.compiler.disable to say that it is meant so",
        r"marked as skipped|should not be traced|SKIP",
    ),
    Remedy(
        "unsupported Python",
        "plain tensor operations and containers in its place, or the value computed once, in __init__",
        r"does not know how to trace|Unsupported|Failed to trace|Missing `as_proxy",
    ),
)


def remedy(message: str, code: str = "") -> Remedy:
    """The way out for a graph break.

    Args:
        message: Dynamo's own text, whole.
        code: the line at which the graph broke.
    """
    told = " ".join([_UNTIL_HINTS.split(message)[0], *_CONTEXT.findall(message)])
    for candidate in REMEDIES:
        if candidate.fits(told, code):
            return candidate
    hints = [hint for hint in _HINT.findall(message) if not _UNHELPFUL.search(hint)]
    advice = hints[0].strip().rstrip(".") if hints else "move the line out of forward, or say it in tensor operations"
    return Remedy("other", advice)


_UNTIL_HINTS = re.compile(r"^\s*Hint: ", re.MULTILINE)
