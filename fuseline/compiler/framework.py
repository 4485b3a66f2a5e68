"""Pass: a frozen dataclass whose fields are its options, in Python, in pipeline text and on the command line."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from .algebra.axioms import Algebra
from .errors import UserError, nearest
from .planned import digest_of
from .rule import Rule

if TYPE_CHECKING:
    from .plan import SitePlan
    from .program import Program
    from .results import Results
    from .rewriter import Rewriter


class Tier(enum.Enum):
    """What a pass does to a model's results."""

    EXACT = "exact"  # equal up to rounding
    LOSSY = "lossy"  # an approximation; runs only when it is named


@dataclass(frozen=True)
class Study:
    """What a pass that needs data is given to decide on.

    program: as the passes before left it; data: flat arguments of one call each, for `program.run`; after: the passes
    that follow; checkpoint: a file that long searches write their progress to and go on from, where one was asked for;
    results: keeps what was computed from contents alone, such as decompositions, for the next analysis.
    """

    program: Program
    data: Sequence[Sequence[Any]]
    after: tuple[Pass, ...] = ()
    checkpoint: Path | None = None
    results: Results | None = None

    def digest(self) -> str:
        """What tells the data from other data; parameters, which are among the arguments, are left out."""
        states = {source.index for source in self.program.sources.values()}
        given = [v for flat in self.data for i, v in enumerate(flat) if i not in states and isinstance(v, torch.Tensor)]
        return hashlib.sha256("".join(map(digest_of, given)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Findings:
    """What a pass decided from data, for people: a table of at most 80 columns, and lines below it."""

    headings: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    lines: tuple[str, ...] = ()


class Level(enum.Enum):
    """Which graph a pass works on."""

    NORMAL = "normal"  # before autograd
    JOINT = "joint"  # AOTAutograd's forward and backward in one graph


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The base of all passes.

    A subclass sets `name` and `tier`, adds its options as fields, and either yields `rules` or overrides `run`. Its
    module's docstring (or its own) is its documentation page. `requires` and `ensures` name invariants; a pipeline in
    which a requirement is not met is an error that names the pass that would meet it.
    """

    name: ClassVar[str] = ""
    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.NORMAL
    example: ClassVar[str] = ""  # a pipeline to try it with, where its bare name is none
    trial: ClassVar[str] = ""  # a command to try it with, where `fuseline run` of the example is none
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    algebra: ClassVar[Algebra | None] = None  # what proves its rewrites, where they are algebra
    needs_data: ClassVar[bool] = False  # `analyze` decides site by site before any rewrite
    is_trained: ClassVar[bool] = False  # or training does: `fuseline.prepare_qat`

    expect: tuple[str, ...] = ()  # fewer rewrites are an error: 61, or RULE:61|RULE:30
    allow_empty: bool = False  # matching no site is not an error

    def relaxed(self) -> Self:
        """The same pass, for which to match few sites or none is no error."""
        return dataclasses.replace(self, expect=(), allow_empty=True)

    def rules(self, program: Program) -> Iterable[Rule]:
        """The rules to apply, in order."""
        raise NotImplementedError(f"{type(self).__name__} has neither rules() nor run()")

    def analyze(self, program: Program, data: Sequence[Sequence[Any]]) -> dict[str, SitePlan]:
        """Decides, once and ahead of time, what to do at each site (`sites.sites(program.graph)` names them).

        program: as the passes before left it; data: flat arguments of one call each, for `program.run`.
        """
        raise NotImplementedError(f"{type(self).__name__} needs data and has no analyze()")

    def decide(self, study: Study) -> dict[str, SitePlan]:
        """The same for a pass whose decisions depend on the passes after it, or take long."""
        return self.analyze(study.program, study.data)

    def needs_symbols(self) -> bool:
        """Whether the lengths of sequences have to be symbols in the graph that Dynamo captures."""
        return False

    def without_data(self) -> Pass | None:
        """What stands for this pass where an earlier one is decided on and this one not yet; None to leave it out."""
        return None if self.needs_data else self

    def findings(self, decisions: Mapping[str, SitePlan]) -> Findings:
        """What `decide` found, to be read before the plan is used."""
        return Findings(lines=(f"decided at {len(decisions)} sites",))

    def run(self, program: Program, rewriter: Rewriter) -> None:
        """Rewrites the program through the rewriter; `rewriter.decision(node)` is what `analyze` decided."""
        rewriter.apply_all(self.rules(program))

    def nothing_matched(self, program: Program) -> tuple[str, ...]:
        """Details for the error when no site matched: what was asked for, what came closest."""
        return ()

    def remedy(self, program: Program) -> str | None:
        """What to write instead when no site matched; None to suggest leaving the pass out."""
        return None

    def __str__(self) -> str:
        words = []
        for field in options(type(self)):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            words.append(field.name if value is True else f"{field.name}={_show(value)}")
        return f"{self.name}{{{','.join(words)}}}" if words else self.name


def options(kind: type[Pass]) -> list[dataclasses.Field[Any]]:
    """A pass's options: its own fields first, the common ones last."""
    fields = list(dataclasses.fields(kind))
    common = {field.name for field in dataclasses.fields(Pass)}
    return [f for f in fields if f.name not in common] + [f for f in fields if f.name in common]


def document(kind: type[Pass]) -> str:
    """The documentation page of a pass: its module's docstring, or its own."""
    import sys

    module = sys.modules.get(kind.__module__)
    own = kind.__doc__ or ""
    page = (module.__doc__ if module is not None and module.__doc__ else "") or own
    return page.strip()


def build(kind: type[Pass], texts: dict[str, str | bool]) -> Pass:
    """A pass from its options' text values.

    Raises:
        UserError: for an unknown option or a value that does not fit, with the nearest valid one.
    """
    hints = typing.get_type_hints(kind)
    valid = {f.name: hints[f.name] for f in options(kind)}
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in valid:
            raise UserError(f"pass '{kind.name}' has no option '{name}'{nearest(name, valid)}")
        values[name] = _read(kind.name, name, valid[name], text)
    return kind(**values)


def _read(owner: str, name: str, kind: Any, text: str | bool) -> Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        members = [k for k in typing.get_args(kind) if k is not type(None)]
        if text in ("none", "auto"):
            return None
        kind = members[0]
    if kind is bool:
        if isinstance(text, bool) or text in ("true", "false"):
            return text is True or text == "true"
        raise UserError(f"option '{name}' of '{owner}' is true or false, not '{text}'")
    if isinstance(text, bool):
        raise UserError(f"option '{name}' of '{owner}' needs a value", remedy=f"{owner}{{{name}=…}}")
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        valid = {str(m.value): m for m in kind}
        if text not in valid:
            raise UserError(f"option '{name}' of '{owner}' cannot be '{text}'{nearest(text, valid)}")
        return valid[text]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise UserError(f"option '{name}' of '{owner}' is {noun}, not '{text}'") from None
    if typing.get_origin(kind) is tuple:
        element = (*typing.get_args(kind), str)[0]
        return tuple(_read(owner, name, element, part) for part in text.split("|") if part)
    return text


def _show(value: Any) -> str:
    text = "|".join(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
    if text != text.strip() or any(c in text for c in ',{}"=\\ '):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


def _plain(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
