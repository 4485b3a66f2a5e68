"""`fuseline view DIR`: a run of a pipeline as one page that any browser opens from the disk."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.calibrating import again, passes_and_plan
from fuseline.cli.dumping import describe_lowered
from fuseline.cli.output import Output
from fuseline.cli.render import following, megabytes
from fuseline.compiler.errors import FuselineError, UserError
from fuseline.compiler.observe import Record
from fuseline.compiler.observe.record import finite, read_record
from fuseline.compiler.pipeline import DEFAULT, Pipeline
from fuseline.compiler.plan import Plan
from fuseline.compiler.progress import bar, step

INDEX = "index.html"


def view(
    source: Annotated[str, typer.Argument(metavar="DIR|GRAPH", help="What --dump wrote; or a model, to run now.")],
    pipeline: Annotated[
        str | None, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="The passes to run over GRAPH.")
    ] = None,
    plan: options.Plan = None,
    out: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="The page; DIR/index.html by default.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Draw a run as one HTML page: stages, diffs, kernels, plots.

    Example: fuseline run demo:tiny-llama --dump out && fuseline view out
    """
    from fuseline.view import page_data, render, steps

    directory = Path(source) if Path(source).is_dir() else None
    if directory is not None and (pipeline or plan) is not None:
        asked = again(pipeline or DEFAULT, plan)
        raise UserError(
            f"{source} holds a run already, of another pipeline perhaps",
            remedy=f"fuseline run MODEL {asked} --dump {source}, then fuseline view {source}",
        )
    path = _page_path(source, directory, out)
    output = Output(json)
    failure: FuselineError | None = None
    if directory is not None:
        record, title = read_record(directory), directory.resolve().name
    else:
        record, failure = _run(source, *passes_and_plan(pipeline or DEFAULT, plan, source), dtype)
        title = source
    where = None if directory is None else str(directory)
    with bar("layout", steps(record)) as progress:
        data = finite(page_data(record, title, where, lambda name: step(progress, name)))
    path.write_text(render(data), encoding="utf-8")
    kernels = data["kernels"]["kernels"] if data["kernels"] else []
    output.line(
        f"{path}: {len(data['stages'])} stages, {len(data['actions'])} rewrites, {len(kernels)} kernels, "
        f"{megabytes(path.stat().st_size)}; opens in any browser, without a network"
    )
    if show and not webbrowser.open(path.resolve().as_uri()):
        output.line("note: there is no browser to open it with")
    stages = data["stages"]
    if failure is not None:
        output.line("the pipeline failed: the page shows how far it came")
    elif directory is not None and len(stages) > 1:
        first, second = (directory / stage["file"] for stage in stages[:2])
        following(output, f"fuseline diff {first} {second}", "what a pass changed, on the terminal")
    else:
        same = again(data["pipeline"], plan)
        following(output, f"fuseline run {source} {same} --dump DIR", "the stages as files that run")
    output.write(data)
    if failure is not None:
        raise failure


def _page_path(source: str, directory: Path | None, out: str | None) -> Path:
    if out is None and directory is None:
        if "/" in source and ":" not in source and not source.endswith((".pt2", ".py")):
            raise UserError(f"no such folder: {source}", remedy="fuseline run MODEL -p PIPELINE --dump DIR")
        raise UserError(f"no file to write the page of {source} to", remedy=f"fuseline view {source} -o FILE.html")
    if out is None:
        assert directory is not None
        return directory / INDEX
    path = Path(out)
    if path.suffix not in (".html", ".htm"):
        raise UserError(f"{out!r} does not end in .html", remedy=f"-o {path.with_suffix('.html')}")
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}")
    return path


def _run(
    graph: str, pipeline: Pipeline, plan: Plan | None, dtype: str | None
) -> tuple[dict[str, Any], FuselineError | None]:
    """The record of a pipeline over a graph, kernels among it; and the error it ended with."""
    from fuseline.cli.compiling import rewrite
    from fuseline.cli.graphs import load_graph
    from fuseline.codegen.lower import lower

    record = Record()
    captured, _ = load_graph(graph, dtype)
    try:
        rewritten = rewrite(captured, pipeline, None, [record], plan)
    except FuselineError as error:
        if not record.data:
            raise
        record.data["stopped"] = str(error)
        return record.data, error
    describe_lowered(record.data, lower(rewritten.program))
    return record.data, None
