"""The check `lower`: does what a pipeline leaves lower to kernels, and do they compile for every target?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..compiler.action import Observer
from ..compiler.debug.check import Verdict
from ..compiler.errors import FuselineError, UserError
from ..compiler.pipeline import Pipeline
from ..compiler.program import Program
from .lower import lower
from .offline import TARGETS, CompileError, compile_kernel


@dataclass(frozen=True)
class LowerCheck:
    """Runs a pipeline, lowers what comes of it and compiles each kernel offline. What the pipeline itself does wrong is
    nothing to it.

    message: a regular expression that the failure must contain.
    """

    message: str | None = None
    targets: tuple[str, ...] = tuple(TARGETS)

    @staticmethod
    def parse(text: str) -> LowerCheck:
        """`lower`, or `lower:REGEX`.

        Raises:
            UserError: the expression is none.
        """
        _, _, value = text.partition(":")
        try:
            re.compile(value)
        except re.error:
            raise UserError(f"'{value}' is no pattern: {text}") from None
        return LowerCheck(value or None)

    def __str__(self) -> str:
        return f"lower:{self.message}" if self.message else "lower"

    def __call__(self, program: Program, pipeline: Pipeline, observers: Sequence[Observer] = ()) -> Verdict:
        """Never raises for what it finds."""
        try:
            after, _ = pipeline.run(program, observers, "off")
        except Exception:  # the fault of a pass, which other checks find
            return Verdict(None)
        try:
            kernels = lower(after).kernels
        except Exception as error:  # whatever an emitter raises
            said = error.headline if isinstance(error, FuselineError) else f"{type(error).__name__}: {error}"
            return self._judge(f"the program does not lower: {said}")
        for kernel in kernels:
            for target in self.targets:
                try:
                    compile_kernel(kernel, target)
                except CompileError as error:
                    said = f"a kernel does not compile for {target}: {_reason(error)}"
                    return self._judge(f"{said}\nit is {kernel.name}")
        return Verdict(None)

    def _judge(self, message: str) -> Verdict:
        wanted = self.message is None or re.search(self.message, message) is not None
        return Verdict("crash" if wanted else None, message)


def _reason(error: CompileError) -> str:
    """What Triton says at the end: before it stands the kernel's text, which is another one in each program."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[-1] if lines else error.headline
