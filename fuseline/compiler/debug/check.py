"""Checks: is something wrong with what a pipeline makes of a program, and is it the same fault as before?

A check answers with a `Verdict`. Its `kind` and `signature` are what a reducer holds on to, so that it does not wander
from one fault to another.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..action import Observer
from ..compat_debug import settle
from ..errors import FuselineError, UserError, VerificationError, nearest
from ..pipeline import Pipeline
from ..precision import clone, error, floats, run_promoted
from ..program import Program
from .sizes import at_size, other_sizes

KINDS = ("crash", "verify", "error", "hang")
# What rounding may add to the noise of the captured graph itself, as max|Δ|/max|reference|.
EXACT = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
Reference = tuple[str, list[Any], list[torch.Tensor], float]  # size, arguments, results, noise
_DIGITS = re.compile(r"0x[0-9a-f]+|\d+")


DELICATE = (os.path.dirname(torch.__file__), contextlib.__file__)
"""Code that an alarm does not end: between two of its lines a mode may be entered that nothing would leave."""
PATIENCE = 2000
"""How often, a thousandth of a second apart, an alarm looks for a better place to end the run at."""


class Hang(BaseException):
    """A pipeline that took longer than it was given; no `Exception`, since the runner reports those as a pass's."""


@dataclass(frozen=True)
class Verdict:
    """What a check found: `kind` is None where nothing is wrong, else one of `KINDS`."""

    kind: str | None
    message: str = ""
    size: str = ""  # the symbolic sizes at which a wrong result shows

    def __bool__(self) -> bool:
        return self.kind is not None

    @property
    def signature(self) -> str:
        """The message without its numbers and names of nodes: what two occurrences of one fault share."""
        return _DIGITS.sub("N", self.message.splitlines()[0] if self.message else "")

    def __str__(self) -> str:
        return (
            "nothing is wrong" if self.kind is None else f"{self.kind}: {self.message}{self.size and f' ({self.size})'}"
        )


@dataclass
class Check:
    """Runs a pipeline over a program and looks for faults.

    kinds: which to look for. bound: the error that an output may have, max|Δ|/max|reference| against the program in
    the next higher precision; None allows what rounding explains, beyond the noise of the captured graph. message: a
    regular expression that a crash's or verification's message must contain. seconds: beyond them a pipeline hangs;
    None waits for ever. sizes: whether results are also compared at other values of the symbolic sizes.
    """

    kinds: tuple[str, ...] = KINDS
    bound: float | None = None
    message: str | None = None
    seconds: float | None = None
    sizes: bool = True
    _references: dict[int, tuple[Program, list[Reference]]] = field(default_factory=dict, repr=False)

    @staticmethod
    def parse(text: str) -> Check:
        """`any`, `crash`, `crash:REGEX`, `verify`, `error`, `error:1e-3`, `hang:SECONDS`, or several with `|`.

        Raises:
            UserError: for another word, with the nearest.
        """
        kinds: list[str] = []
        settings: dict[str, Any] = {}
        for word in text.split("|"):
            kind, _, value = word.strip().partition(":")
            if kind == "any":
                kinds += KINDS
            elif kind not in KINDS:
                raise UserError(f"unknown check '{kind}'{nearest(kind, ['any', *KINDS])}")
            else:
                kinds.append(kind)
            if value:
                try:
                    if kind in ("crash", "verify"):
                        re.compile(value)
                        settings["message"] = value
                    else:
                        settings["bound" if kind == "error" else "seconds"] = float(value)
                except (ValueError, re.error):
                    raise UserError(f"'{value}' is no {'number' if kind != 'crash' else 'pattern'}: {word}") from None
        return Check(tuple(dict.fromkeys(kinds)), **settings)

    def __str__(self) -> str:
        if set(self.kinds) == set(KINDS) and self.bound is None and self.message is None and self.seconds is None:
            return "any"
        values = {"crash": self.message, "verify": self.message, "error": self.bound, "hang": self.seconds}
        return "|".join(kind if values[kind] is None else f"{kind}:{values[kind]}" for kind in self.kinds)

    def __call__(
        self,
        program: Program,
        pipeline: Pipeline,
        observers: Sequence[Observer] = (),
        reference: Program | None = None,
    ) -> Verdict:
        """Runs the pipeline over a copy of the program; never raises for what it finds.

        reference: what the results are compared with, where `program` is a later stage of it.
        """
        try:
            with _limit(self.seconds):
                after, _ = pipeline.run(program, observers, "full" if "verify" in self.kinds else "off")
        except VerificationError as found:
            return self._judge("verify", str(found))
        except Hang:
            settle(program.fake_mode)
            return self._judge("hang", f"the pipeline is not done after {self.seconds:g} s")
        except Exception as found:
            return self._judge("crash", str(found) if isinstance(found, FuselineError) else _line(found))
        return self.compare(reference or program, after)

    def compare(self, program: Program, after: Program) -> Verdict:
        """Whether a rewritten program still computes what the program does; inputs that it writes to count too."""
        if "error" not in self.kinds or program.examples is None:
            return Verdict(None)
        for size, flat, reference, noise in self._reference(program):
            try:
                found = results(after, flat)
            except Exception as failure:
                return self._judge("crash", f"the rewritten program does not run: {_line(failure)}", size)
            if len(found) != len(reference):
                return Verdict("error", f"{len(found)} results instead of {len(reference)}", size)
            for position, (a, r) in enumerate(zip(found, reference, strict=True)):
                if a.shape != r.shape:
                    return Verdict("error", f"result {position} is {list(a.shape)}, not {list(r.shape)}", size)
                worst = error(a, r)
                bound = self.bound if self.bound is not None else noise * 4 + EXACT.get(a.dtype, 1e-5)
                if not worst <= bound:
                    return Verdict("error", f"result {position} is off by {worst:.1e}; {bound:.1e} is allowed", size)
        return Verdict(None)

    def _judge(self, kind: str, message: str, size: str = "") -> Verdict:
        wanted = kind in self.kinds and (self.message is None or re.search(self.message, message) is not None)
        return Verdict(kind, message, size) if wanted else Verdict(None, message, size)

    def _reference(self, program: Program) -> list[Reference]:
        """(size, arguments, results in higher precision, noise) at each size, worked out once a program."""
        if id(program) not in self._references:
            assert program.examples is not None
            cases: list[tuple[str, list[Any]]] = [("", list(program.examples))]
            if self.sizes:
                cases += [(size, flat) for size in other_sizes(program) if (flat := at_size(program, size)) is not None]
            found = []
            for size, flat in cases:
                try:
                    reference, plain = results(program, flat, promoted=True), results(program, flat)
                except Exception:
                    if not size:
                        raise
                    continue  # a size that the model itself does not take
                noise = max((error(a, r) for a, r in zip(plain, reference, strict=True)), default=0.0)
                found.append((size, flat, reference, noise))
            self._references[id(program)] = program, found  # kept alive, so that its identity stays its own
        return self._references[id(program)][1]


def results(program: Program, flat: Sequence[Any], promoted: bool = False) -> list[torch.Tensor]:
    """The floating-point results of a program, then the inputs that it writes to, as they are after the run."""
    flat = [clone(x) for x in flat]
    written: dict[str, Any] = {}
    if promoted:
        outputs = run_promoted(program, flat, written)
    else:
        with torch.no_grad():
            outputs = program.run(flat)
        named = zip((n.name for n in program.placeholders), program.arguments, strict=True)
        written = {name: flat[position] for name, position in named if name in program.mutated}
    return [*floats(outputs), *floats([written[name] for name in sorted(written)])]


@contextlib.contextmanager
def _limit(seconds: float | None) -> Iterator[None]:
    """Raises `Hang` in the block after some seconds, in the main thread of a system that has alarms."""
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if seconds is None or not usable:
        yield
        return

    patience = PATIENCE

    def ring(_: int, frame: Any) -> None:
        nonlocal patience
        patience -= 1
        if patience and frame is not None and frame.f_code.co_filename.startswith(DELICATE):
            signal.setitimer(signal.ITIMER_REAL, 0.001, 1.0)
            return
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    # Again after a second: what is raised where a weak reference dies is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _line(found: BaseException) -> str:
    lines = [line for line in str(found).splitlines() if line.strip()]
    return f"{type(found).__name__}: {lines[0] if lines else ''}"
