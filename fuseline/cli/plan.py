"""`fuseline plan MODEL --gpus N --memory 80GB`: what can be trained there, before anything runs."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.output import Output, announce
from fuseline.cli.render import following, table
from fuseline.compiler.errors import UserError

Shape = Annotated[str, typer.Argument(metavar="MODEL", help="shape:NAME (llama-3.1-70b, …), or hf:DIR: config.json.")]


def plan(
    model: Shape,
    gpus: Annotated[int, typer.Option(metavar="N", min=1, help="How many GPUs.")] = 1,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Of each GPU.")] = "80GB",
    seq: Annotated[int, typer.Option(metavar="S", min=256, help="The length to decide for.")] = 32768,
    device: Annotated[str, typer.Option(metavar="D", help="a100, h100, h200 or b200.")] = "h100",
    logits: Annotated[bool, typer.Option(help="Whether the loss stores logits.")] = False,
    every: Annotated[bool, typer.Option("--all", help="A row for every policy.")] = False,
    json: options.Json = None,
) -> None:
    """Show what can be trained, and the longest sequences."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    from fuseline.compiler.machine import find_machine
    from fuseline.models.shapes import find_shape
    from fuseline.passes.checkpointing import read_memory
    from fuseline.planning import joint_of_shape
    from fuseline.planning.formulas import closed_text, size_text
    from fuseline.planning.search import STATE, Planner

    shape, machine, limit = find_shape(model), find_machine(device), read_memory(memory)
    if limit <= 1:
        raise UserError("--memory is a GPU's, in bytes", remedy="--memory 80GB")
    output = Output(json)
    announce("tracing a step")
    planner = Planner(shape, joint_of_shape(shape, loss=logits), machine, gpus, limit, seq)
    announce("solving")
    rows = planner.rows()
    state, gathered = planner.state()
    output.line(
        f"{model}: {shape.parameters / 1e9:.3g} billion parameters in {shape.layers} layers, on {gpus} x {device} of "
        f"{size_text(limit)}"
    )
    output.line(
        f"a GPU holds {size_text(state)} of states ({STATE} bytes a parameter, sharded over {gpus})"
        + (f" and {size_text(gathered)} of gathered weights" if gathered else "")
    )
    output.line(f"the loss {'stores logits' if logits else 'is computed without storing logits'}; batch 1\n")
    shown = rows if every else _best(rows)
    cells = [
        [
            str(r.degree),
            r.kind,
            r.policy,
            f"{r.longest:,}" if r.longest else "-",
            size_text(r.peak) if r.peak is not None else "-",
            f"{r.seconds:.3g}" if r.seconds is not None else "-",
            f"{r.tokens:,.0f}" if r.tokens is not None else "does not fit",
        ]
        for r in shown
    ]
    table(output, ["degree", "kind", "policy", "longest S", f"peak at {seq:,}", "seconds", "tokens/s"], cells)
    output.line("\nbytes on a GPU by the length S, and the longest S by its memory M:")
    for r in shown:
        output.line(f"  degree {r.degree}, {r.policy if r.kind == '-' else f'{r.kind}, {r.policy}'}: {r.formula}")
        output.line(f"    S = {closed_text(r.closed)}")
    fastest = max((r for r in rows if r.tokens is not None), key=lambda r: (r.tokens, -r.degree), default=None)
    if fastest is None:
        output.line(f"\nno row fits {seq:,} tokens")
        following(output, f"fuseline plan {model} --gpus {2 * gpus} --memory {memory} --seq {seq}", "more GPUs")
    else:
        output.line(f"\nthe fastest that fits {seq:,} tokens: degree {fastest.degree}, {fastest.policy}")
        if fastest.degree > 1:
            output.line(f"  raise,sequence-parallel{{{fastest.layout.options}}}")
        following(output, f"fuseline memory {model} --seq {seq}", "each activation, and the timeline")
    output.write({"model": model, "gpus": gpus, "memory": limit, "device": device, "sequence": seq, "logits": logits,
                  "state": state, "gathered": gathered, "rows": [_data(r) for r in rows],
                  "fastest": _data(fastest) if fastest else None})  # fmt: skip


def _best(rows: list[Any]) -> list[Any]:
    """Of each degree the fastest row that fits, and the one that reaches furthest; of several that reach as far within
    a twentieth, the fastest."""
    found = []
    for degree in dict.fromkeys(r.degree for r in rows):
        ours = [r for r in rows if r.degree == degree]
        fits = [r for r in ours if r.seconds is not None]
        reach = max(r.longest for r in ours)
        far = [r for r in ours if r.longest >= 0.95 * reach]
        furthest = min(far, key=lambda r: (r.seconds is None, r.seconds or 0.0))
        fastest = min(fits, key=lambda r: r.seconds, default=furthest)
        found += [fastest] if fastest is furthest else [fastest, furthest]
    return found


def _data(row: Any) -> dict[str, Any]:
    return {
        "degree": row.degree, "kind": row.kind, "ring": row.layout.ring, "policy": row.policy,
        "longest": row.longest, "peak": row.peak, "seconds": row.seconds, "tokens_a_second": row.tokens,
        "bytes": [str(t) for t in row.formula.terms], "longest_by_memory": str(row.closed),
    }  # fmt: skip
