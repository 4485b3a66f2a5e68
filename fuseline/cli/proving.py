"""What `--prove` shows: each kind of rewrite with its statement, the axioms, and the rotations' orthogonality."""

from __future__ import annotations

import textwrap
from typing import Any

from fuseline.cli.output import WIDTH, Output
from fuseline.cli.render import number, table
from fuseline.compiler.observe import Proof


def show_proof(output: Output, data: dict[str, Any], proof: Proof) -> None:
    """Puts the proof into `data`, prints it, and raises where something is not proved, the data written before.

    Raises:
        VerificationError: a statement is not proved, or a rotation is not orthogonal.
    """
    found = data["proof"] = proof.to_json()
    rows = [
        [str(i), str(s["count"]), s["rule"], "yes" if s["proved"] else "no", number(s["error"])]
        for i, s in enumerate(found["statements"], 1)
    ]
    output.line(f"\n{found['proved']} of {found['count']} statements are proved, of {len(rows)} kinds")
    table(output, ["kind", "times", "rewrite", "proved", "error"], rows)
    output.line()
    for i, s in enumerate(found["statements"], 1):
        text = s["text"] or s["status"]
        output.line(textwrap.fill(text, WIDTH, initial_indent=f"{i:4}  ", subsequent_indent=" " * 8))
    output.line()
    table(output, ["times", "axiom"], [[str(count), axiom] for axiom, count in found["axioms"].items()])
    if found["rotations"]:
        residuals = ", ".join(f"{name} {number(r)}" for name, r in found["rotations"].items())
        output.line(f"max|R·Rᵀ − 1|: {residuals}")
    for name, count in found["unread"].items():
        output.line(f"nothing is said of {count} rewrites of {name}, which declares no algebra")
    if not proof.is_complete:
        output.write(data)
        proof.check()
