"""What each option of a pass is for: the comment behind its field."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize


def comments(kind: type) -> dict[str, str]:
    """Field → the comment on its line, of a class and its bases; nothing where the source is not at hand."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # typed in, or made by a program
            continue
        lines = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (body,) = ast.parse(source).body
        for statement in getattr(body, "body", ()):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                found[statement.target.id] = lines.get(statement.end_lineno or 0, "")
    return found
