"""`fuseline memory MODEL`: every activation of a training step, what becomes of it and why, and memory over time."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fuseline.cli import options
from fuseline.cli.output import Output, announce
from fuseline.cli.render import following, table
from fuseline.cli.sparsity import BARS
from fuseline.compiler.errors import UserError

COLUMNS = 64


def memory(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="shape:NAME, or a model: demo:smollm2, hf:DIR, …")],
    pipeline: Annotated[
        str, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="With a checkpoint pass.")
    ] = "checkpoint{policy=long-context}",
    seq: Annotated[int, typer.Option(metavar="S", min=2, help="Tokens of the sequence.")] = 8192,
    limit: Annotated[str, typer.Option("--memory", metavar="SIZE", help="Of the device.")] = "80GB",
    device: Annotated[str, typer.Option(metavar="D", help="a100, h100, h200, b200 or cpu.")] = "h100",
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Rows of the table.")] = 16,
    points: Annotated[int, typer.Option(metavar="N", min=0, help="Points of the Pareto curve.")] = 5,
    lengths: Annotated[int, typer.Option(metavar="N", min=0, help="Plans by the length, from --seq on.")] = 0,
    plot: Annotated[str | None, typer.Option(metavar="FILE.svg", help="Memory over the step, drawn.")] = None,
    json: options.Json = None,
) -> None:
    """Show a training step's activations and its peak."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    from fuseline.compiler.pipeline import Pipeline
    from fuseline.models.shapes import find_shape
    from fuseline.passes.checkpointing import Checkpoint, input_bytes, read_memory, sequence_symbol
    from fuseline.passes.checkpointing.policies import Policy, at_peak, choose
    from fuseline.planning.formulas import closed_text, longest, size_text, step_formula

    passes = Pipeline(pipeline)
    step = next((p for p in passes.joint if isinstance(p, Checkpoint)), None)
    if step is None:
        raise UserError(f"'{pipeline}' has no checkpoint pass", remedy='-p "checkpoint{policy=long-context}"')
    output = Output(json)
    announce("tracing a step")
    program, layers = _program(model, seq, ",".join(str(p) for p in passes.passes if p not in passes.joint))
    problem = _at_length(step, program, seq, device, layers)
    symbol = sequence_symbol(problem.tape)
    announce("solving")
    owned = 2.0 * find_shape(model).parameters if layers else input_bytes(problem.tape, problem.at)
    choice = choose(problem, step.policy, step.limit(problem, owned))
    everything = choose(problem, Policy.NONE)
    peak, most = problem.peak(choice.execution), problem.peak(everything.execution)
    of = f", {layers} layers by {problem.traced} traced" if layers else ""
    output.line(f"{model}: a step on {seq:,} tokens{of}, rates of {device}")
    share = problem.time(choice.execution) / max(problem.step_seconds, 1e-12)
    output.line(
        f"peak of activations and gradients: {size_text(peak)} with {step}, {size_text(most)} where all is kept"
    )
    output.line(f"computed again: {share:.1%} of the step's time; the solver's gap {choice.gap:.2%}\n")
    found = _activations(problem, choice)
    shown = [[r["site"], str(r["count"]), size_text(r["bytes"]), r["decision"], r["why"]] for r in found[:rows]]
    table(output, ["activation", "count", "bytes", "is", "why"], shown)
    if len(found) > rows:
        output.line(f"… and {len(found) - rows} more: --rows {len(found)}")
    lines = [p.at(problem.sizes) for p in (choice.execution.forward, choice.execution.backward)]
    traced = f" of the {problem.traced} blocks that were traced" if layers else ""
    output.line(f"\nmemory over the step{traced}, up to {size_text(max(line.max(initial=0) for line in lines))}:")
    for name, line in zip(("forward ", "backward"), _bars(lines)):
        output.line(f"  {name} {line}")
    output.line("at its fullest:")
    for size, what in at_peak(problem, choice.execution):
        output.line(f"  {size_text(size):>9}  {what}")
    curve = _curve(problem, points)
    if curve:
        output.line()
        cells = [[r["name"], size_text(r["peak"]), f"{r['seconds'] * 1e3:.3g}"] for r in curve]
        table(output, ["choice", "peak", "ms computed again"], cells)
    reach, stretches = None, []
    if lengths and symbol is None:
        raise UserError("--lengths needs a length that is symbolic: this model was captured with a fixed one")
    if symbol is not None:
        formula = step_formula(problem, choice, symbol, layers)
        room = read_memory(limit) - owned
        reach, closed = longest(formula, room)
        output.line(f"\nby the length S: {formula}")
        output.line(f"longest S in {limit} less {size_text(owned)} of parameters and inputs: {reach:,}")
        output.line(f"  = {closed_text(closed)}, where M is what is left")
        stretches = _lengths(problem, symbol, layers, room, seq, lengths) if lengths else []
        _tell_lengths(output, stretches, limit)
    if plot is not None:
        Path(plot).write_text(_svg(lines), encoding="utf-8")
        output.line(f"\nwrote {plot}")
    planned = model if model.startswith(("shape:", "hf:")) else "shape:llama-3.1-8b"
    following(output, f"fuseline plan {planned} --gpus 8", "the same for several GPUs")
    output.write({"model": model, "sequence": seq, "device": device, "pass": str(step), "peak": peak,
                  "peak_kept": most, "owned": owned, "activations": found,
                  "forward": lines[0].tolist(), "backward": lines[1].tolist(),
                  "curve": curve, "longest": reach, "lengths": [_stretch(s) for s in stretches]})  # fmt: skip


def _lengths(problem: Any, symbol: Any, layers: int | None, room: float, seq: int, most: int) -> list[Any]:
    """The fastest plans within a device's memory, from a length on."""
    from dataclasses import replace

    from fuseline.planning import by_length

    at = lambda length: replace(problem, at={**problem.at, symbol: length}, layers=layers, patience=6.0)
    announce("solving for longer sequences")
    return by_length(at, symbol, room, layers, seq, most)


def _tell_lengths(output: Output, stretches: list[Any], limit: str) -> None:
    """Which plan is the fastest from which length to which, and how far each reaches by the memory."""
    from fuseline.planning.formulas import closed_text

    if not stretches:
        return
    output.line(f"\nthe fastest within {limit} by the length:")
    cells = [[f"{s.first:,}", f"{s.last:,}", f"{s.share:.2%}", closed_text(s.closed)] for s in stretches]
    table(output, ["from", "to", "again", "it fits to, by the memory M that is left"], cells)


def _stretch(one: Any) -> dict[str, Any]:
    return {
        "first": one.first, "last": one.last, "seconds": one.seconds, "share": one.share,
        "bytes": [str(t) for t in one.formula.terms], "longest_by_memory": str(one.closed),
    }  # fmt: skip


def _program(model: str, seq: int, before: str) -> tuple[Any, int | None]:
    """The joint graph, and how many layers it stands for where fewer were traced."""
    from fuseline.models import load
    from fuseline.models.shapes import find_shape
    from fuseline.planning import joint_of_model, joint_of_shape

    if model.startswith("shape:"):
        shape = find_shape(model)
        return joint_of_shape(shape), shape.layers
    loaded = load(model, None)
    loaded.model.train()
    loaded.model.requires_grad_(True)
    args = list(loaded.example_args)
    if loaded.tokenizer is not None:
        args[0] = torch.zeros((1, min(seq, 128)), dtype=torch.int64)
        torch._dynamo.mark_dynamic(args[0], 1)
    return joint_of_model(loaded.model, args, dict(loaded.example_kwargs), before or "raise{allow_empty}"), None


def _at_length(step: Any, program: Any, seq: int, device: str, layers: int | None) -> Any:
    from dataclasses import replace

    from fuseline.compiler.tape import tape
    from fuseline.passes.checkpointing import sequence_symbol

    symbolic = sequence_symbol(tape(program)) is not None
    return replace(step, device=step.device or device, target_seq=seq if symbolic else 0).problem(program, layers)


def _activations(problem: Any, choice: Any) -> list[dict[str, Any]]:
    """The forward's storages by place and decision, layers together, the largest first."""
    from fuseline.compiler.provenance import module_path, source_line
    from fuseline.compiler.sites import op_name
    from fuseline.passes.checkpointing.program import relevant

    tape, wanted = problem.tape, relevant(problem.tape)
    again = set(choice.execution.recomputed)
    offloaded = problem.sections.spread(choice.offloaded)
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for s, one in enumerate(tape.storages):
        if not tape.is_forward[one.owner] or s not in wanted:
            continue
        node = tape.nodes[one.owner]
        path = re.sub(r"\.\d+(?=\.|$)", ".*", module_path(node))
        place = path or (source_line(node) or "").rpartition("/")[2]
        decision = "kept" if s in choice.execution.saved else "again" if one.owner in again else "dropped"
        decision = "host" if s in offloaded and decision == "kept" else decision
        why = choice.why.get(problem.sections.stands_for.get(s, s), "")
        times = problem.times(one.owner)
        groups[f"{place} {op_name(node)}".strip(), decision, why].append((times, float(problem.sizes[one.size])))
    rows = [
        {"site": site, "count": round(sum(t for t, _ in v)), "bytes": sum(t * b for t, b in v),
         "decision": decision, "why": why}
        for (site, decision, why), v in groups.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda r: -r["bytes"])


def _curve(problem: Any, points: int) -> list[dict[str, Any]]:
    """Choices between the smallest peak and that of keeping everything."""
    from fuseline.passes.checkpointing.policies import Policy, choose, smallest

    if not points:
        return []
    named = {p.value: choose(problem, p) for p in (Policy.NONE, Policy.MIN_CUT, Policy.LONG_CONTEXT, Policy.FULL)}
    rows = [
        {"name": n, "peak": problem.peak(c.execution), "seconds": problem.time(c.execution)} for n, c in named.items()
    ]
    _, least = smallest(problem)
    low, high = problem.peak(least), problem.peak(named["none"].execution)
    rows.append({"name": "smallest", "peak": low, "seconds": problem.time(least)})
    for share in np.linspace(0, 1, points + 2)[1:-1]:
        found = choose(problem, Policy.BUDGET, low + float(share) * (high - low)).execution
        rows.append({"name": "budget", "peak": problem.peak(found), "seconds": problem.time(found)})
    return sorted(rows, key=lambda r: r["peak"])


def _bars(lines: list[np.ndarray]) -> list[str]:
    """Profiles as bars of one height: the largest value of each of COLUMNS stretches."""
    top = max(line.max(initial=0) for line in lines) or 1
    found = []
    for line in lines:
        parts = [part.max(initial=0) for part in np.array_split(line, min(COLUMNS, max(len(line), 1)))]
        found.append("".join(BARS[int(round((len(BARS) - 1) * p / top))] for p in parts))
    return found


def _svg(lines: list[np.ndarray]) -> str:
    """Memory over forward and backward, as one area."""
    values = np.concatenate(lines)
    width, height, top = 900, 300, float(values.max(initial=1)) or 1.0
    xs = np.linspace(40, width - 10, max(len(values), 2))
    points = " ".join(f"{x:.1f},{height - 30 - (height - 60) * v / top:.1f}" for x, v in zip(xs, values))
    turn = xs[min(len(lines[0]), len(xs) - 1)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="18">'
        f'<polygon points="40,{height - 30} {points} {width - 10},{height - 30}" fill="#9ec5e8"/>'
        f'<line x1="{turn:.1f}" x2="{turn:.1f}" y1="26" y2="{height - 30}" stroke="#666" stroke-dasharray="4"/>'
        f'<text x="45" y="18">{top / 1e9:.3g} GB at the fullest step</text>'
        f'<text x="45" y="{height - 10}">forward</text>'
        f'<text x="{turn + 5:.1f}" y="{height - 10}">backward</text></svg>\n'
    )
