"""Writing program text: indentation, names that cannot clash, masked loads and stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Text:
    """Lines of a program, indented by `with text.block("for …:")`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._depth = 0

    def add(self, *lines: str) -> None:
        self.lines += ["    " * self._depth + line if line else "" for line in lines]

    @contextmanager
    def block(self, head: str | None) -> Iterator[None]:
        """Indents what is added inside; with `head` None the lines stay at this depth."""
        if head is None:
            yield
            return
        self.add(head)
        with self.indented():
            yield

    @contextmanager
    def indented(self) -> Iterator[None]:
        self._depth += 1
        yield
        self._depth -= 1

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"


class Names:
    """Hands out identifiers; a name that is taken gets a number."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def new(self, wish: str) -> str:
        name, number = wish, 0
        while name in self._taken:
            number += 1
            name = f"{wish}_{number}"
        self._taken.add(name)
        return name


def joined(conditions: Iterable[str | None]) -> str:
    """Mask conditions as the tail of a load or store: "" when nothing needs a mask."""
    present = [c for c in conditions if c]
    return f", mask={' & '.join(present)}" if present else ""


def is_nvidia(tensor: str) -> str:
    """Of a host function: whether the tensor is on a GPU of NVIDIA's, for the constant `PTX`."""
    return f"{tensor}.is_cuda and torch.version.hip is None"


def load(pointer: str, conditions: Iterable[str | None] = (), other: str = "0.0") -> str:
    """A `tl.load`; masked lanes read `other`."""
    mask = joined(conditions)
    return f"tl.load({pointer}{mask}{f', other={other}' if mask else ''})"
