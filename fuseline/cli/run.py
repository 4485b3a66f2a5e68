"""`fuseline run MODEL -p PIPELINE`: what a pipeline does to a model, measured."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.calibrating import again, calibrate, needs_plan, passes_and_plan
from fuseline.cli.compiling import capture_model, rewrite
from fuseline.cli.data import report_data
from fuseline.cli.dumping import dump_observers, record_kernels
from fuseline.cli.environment import choose_target, versions
from fuseline.cli.measure import continue_text, measure
from fuseline.cli.offline import describe_kernels
from fuseline.cli.output import Output, announce
from fuseline.cli.proving import show_proof
from fuseline.cli.render import following, number, show_breaks, show_kernels, show_measurements, show_passes
from fuseline.compiler.observe import Prove
from fuseline.compiler.pipeline import DEFAULT

PROMPT = "A compiler is a program that"


def run(
    model: options.Model,
    pipeline: options.PipelineText = DEFAULT,
    plan: options.Plan = None,
    target: options.Target = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    verify: options.Verification = None,
    prove: options.Prove = False,
    dump: options.Dump = None,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows of 256 tokens to compare on.")] = 8,
    tokens: Annotated[int, typer.Option(metavar="N", help="How many tokens to continue with.")] = 24,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue.")] = PROMPT,
    json: options.Json = None,
) -> None:
    """Run a pipeline over a model and report what it did."""
    from fuseline import breaks, optimize
    from fuseline.codegen.lower import lower
    from fuseline.models import load, parse_dtype

    passes, decided = passes_and_plan(pipeline, plan, model, calibrates=True)
    chosen, notes = choose_target(target, device)
    output = Output(json)
    loaded = load(model, parse_dtype(dtype)).to(device)
    calibrated = None
    if passes.needs_data and decided is None:
        if loaded.tokenizer is None:
            raise needs_plan(passes, model)
        announce("calibrating")
        decided, calibrated = calibrate(loaded, passes)
        notes = [*notes, f"calibrated on {calibrated}, for this run only; what is next keeps the plan"]
    announce("capturing")
    proving = [Prove()] if prove else []
    rewritten = rewrite(capture_model(loaded), passes, verify, [*dump_observers(dump), *proving], decided)
    data: dict[str, Any] = {
        "model": model,
        "target": chosen,
        "device": device,
        "calibrated": calibrated,
        "versions": versions(),
        **report_data(rewritten),
    }
    captured = data["captured"]
    noise = number(captured["error"])
    output.line(f"{model}: {captured['nodes']} nodes captured, rounding noise {noise}, target {chosen}\n")
    show_passes(output, data)
    for observer in proving:
        show_proof(output, data, observer.proof)

    announce("measuring")
    optimize(loaded.model, passes, target=chosen, plan=decided)
    data["metrics"] = measure(loaded, windows)
    data["breaks"] = [{"file": b.file, "line": b.line, "reason": b.reason} for b in breaks(loaded.model)]
    output.line()
    show_measurements(output, data)
    show_breaks(output, data)

    lowered = lower(rewritten.program)
    if dump is not None:
        record_kernels(dump, lowered)
    announce(f"compiling {len(lowered.kernels)} kernels")
    data["kernels"] = describe_kernels(lowered)
    data["eager"] = [{"region": name, "reason": reason} for name, reason in lowered.refusals.items()]
    if data["kernels"]:
        output.line()
        show_kernels(output, data)

    data["prompt"], data["generated"] = None, None
    if loaded.tokenizer is not None and tokens > 0:
        data["prompt"], data["generated"] = prompt, continue_text(loaded, prompt, tokens)
        output.line(f"\ntext: {data['generated']}")
    data["notes"] = notes
    for note in notes:
        output.line(f"note: {note}")
    if calibrated is not None:
        following(output, f'fuseline analyze {model} -p "{passes}" -o plan.json', "the plan, for other verbs and runs")
    else:
        following(output, f"fuseline kernels {model} {again(passes, plan)}", "the kernels, with their source lines")
    output.write(data)
