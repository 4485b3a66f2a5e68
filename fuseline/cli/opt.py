"""`fuseline opt GRAPH -p PIPELINE -o OUT`: passes over a program, from a file and into a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.utils._pytree as pytree
import typer

from fuseline.cli import options
from fuseline.cli.calibrating import again, passes_and_plan
from fuseline.cli.compiling import rewrite
from fuseline.cli.data import report_data
from fuseline.cli.dumping import dump_observers, record_kernels
from fuseline.cli.environment import versions
from fuseline.cli.graphs import load_graph
from fuseline.cli.output import Output
from fuseline.cli.proving import show_proof
from fuseline.cli.render import following, megabytes, show_passes
from fuseline.cli.statistics import show_statistics, statistics_data
from fuseline.compiler.errors import FuselineError, UserError
from fuseline.compiler.observe import Prove, Statistics
from fuseline.compiler.observe.printing import Print, stop_after
from fuseline.compiler.outline import inline
from fuseline.compiler.pipeline import DEFAULT
from fuseline.compiler.program import Program
from fuseline.compiler.stage import Recipe, render, save_examples
from fuseline.models import LoadedModel


def opt(
    graph: options.Graph,
    pipeline: options.PipelineText = DEFAULT,
    plan: options.Plan = None,
    out: Annotated[
        str | None, typer.Option("--output", "-o", metavar="OUT", help="A .pt2 file, or a .py stage.")
    ] = None,
    stop: Annotated[
        str | None, typer.Option("--stop-after", metavar="PASS[:N]", help="Or after its N rewrites.")
    ] = None,
    show: Annotated[
        str | None, typer.Option("--print-after", metavar="P", help="all, changed or a pass: its code.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Each rule's tries, hits and time.")] = False,
    dump: options.Dump = None,
    dtype: options.Dtype = None,
    verify: options.Verification = None,
    prove: options.Prove = False,
    json: options.Json = None,
) -> None:
    """Rewrite a model, a .pt2 program or a dumped stage."""
    from fuseline.codegen.lower import lower

    path = None if out is None else check_path(out)
    passes, decided = passes_and_plan(pipeline, plan, graph)
    observers = dump_observers(dump)
    if stop is not None:
        passes, ending = stop_after(passes, stop)
        if decided is not None:
            decided = dataclasses.replace(decided, pipeline=str(passes))  # the first passes of what it was made for
        observers += ending
    output = Output(json)
    if show is not None:
        observers.append(Print(show, lambda text: output.console.print(text + "\n", soft_wrap=True)))
    captured, loaded = load_graph(graph, dtype)
    counted, proving = Statistics(), [Prove()] if prove else []
    rewritten = rewrite(captured, passes, verify, [*observers, counted, *proving], decided)
    data: dict[str, Any] = {"model": graph, "versions": versions(), **report_data(rewritten), "path": out}
    data["statistics"] = statistics_data(counted)
    show_passes(output, data)
    if stats:
        show_statistics(output, data)
    for observer in proving:
        show_proof(output, data, observer.proof)
    if path is not None and path.suffix == ".py":
        title = f"{graph} after {passes}{f', stopped after {stop}' if stop else ''}"
        write_stage(rewritten.program, title, path)
        output.line(f"\n{path}: {megabytes(path.stat().st_size)}, to read, edit, run and resume from")
    elif path is not None:
        write_program(rewritten.program, loaded, path)
        output.line(f"\n{path}: {megabytes(path.stat().st_size)}; its fuseline ops load after `import fuseline`")
    if dump is not None:
        record_kernels(dump, lower(rewritten.program))
        following(output, f"fuseline view {dump}", "the stages as a page")
    else:
        following(output, f"fuseline compare {graph} {again(passes, plan)}", "the error of each rewrite")
    output.write(data)


def check_path(out: str) -> Path:
    """A path that a program can be written to.

    Raises:
        UserError: another ending than .pt2 and .py, or a folder that is not there.
    """
    path = Path(out)
    if path.suffix not in (".pt2", ".py"):
        raise UserError(f"{out!r} ends in neither .pt2 nor .py", remedy=f"-o {path.with_suffix('.pt2')}")
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}")
    return path


def write_stage(program: Program, title: str, path: Path) -> None:
    """Writes a program as a stage, its tensors in a folder of the stage's own beside it where they are many."""
    if program.examples is None:
        path.write_text(render(program, title, Recipe("none"), path.name), encoding="utf-8")
        return
    save_examples(program, path.parent, f"{path.stem}.safetensors")
    path.write_text(
        render(program, title, Recipe("file", name=f"{path.stem}.safetensors"), path.name), encoding="utf-8"
    )


class Standalone(torch.nn.Module):
    """A program with the values of its weights as buffers.

    It takes the captured call's tensors by position, keyword arguments after the others; what was no tensor (a flag)
    is fixed in the graph. It returns what the captured model returned.
    """

    def __init__(self, program: Program, loaded: LoadedModel | None):
        super().__init__()
        module, expressions = program.lift()
        if program.examples is None:
            raise UserError("a .pt2 file holds weights, and this stage has types only", remedy="-o FILE.py")
        names = [node.name for node in module.graph.nodes if node.op == "placeholder"][-len(expressions) :]
        self._weights = tuple(names) if expressions else ()
        for name, value in zip(self._weights, program.binder(expressions)(program.examples), strict=True):
            self.register_buffer(name, value.detach())
        self._graph = inline(module)
        self._arguments = tuple(program.arguments)
        # The caller's own arguments among the flat ones; the rest are parameters.
        states = {source.index for source in program.sources.values()}
        user = {i: value for i, value in enumerate(program.examples) if i not in states}
        self._fixed = {i: value for i, value in user.items() if not isinstance(value, torch.Tensor)}
        self.inputs = {i: value for i, value in user.items() if isinstance(value, torch.Tensor)}
        with torch.no_grad():
            if loaded is None:  # a stage: the flat results of its graph
                output = program.run(program.examples)
            else:
                output = loaded.model(*loaded.example_args, **loaded.example_kwargs)
        self._out_spec = pytree.tree_structure(output)

    def forward(self, *tensors: torch.Tensor) -> Any:
        flat = {**self._fixed, **dict(zip(self.inputs, tensors, strict=True))}
        weights = [getattr(self, name) for name in self._weights]
        outputs = self._graph(*[flat[i] for i in self._arguments], *weights)
        return pytree.tree_unflatten(pytree.tree_leaves(outputs), self._out_spec)


def symbolic_sizes(program: Program, positions: Iterable[int]) -> tuple[dict[int, Any], ...]:
    """For each argument, the dimensions that are symbolic in the program, as torch.export takes them."""
    values = dict(zip(program.arguments, (node.meta["val"] for node in program.placeholders), strict=True))
    auto = torch.export.Dim.AUTO
    return tuple(
        {i: auto for i, size in enumerate(values[p].shape) if isinstance(size, torch.SymInt)} if p in values else {}
        for p in positions
    )


def write_program(program: Program, loaded: LoadedModel | None, path: Path) -> None:
    """Exports the rewritten program, weights included, and saves it; a failure leaves no file behind."""
    temporary = path.with_name(f".{path.stem}.partial.pt2")
    standalone = Standalone(program, loaded)
    try:
        with torch.no_grad():
            exported = torch.export.export(
                standalone,
                tuple(standalone.inputs.values()),
                dynamic_shapes=(symbolic_sizes(program, standalone.inputs),),
                strict=False,
            )
        torch.export.save(exported, temporary)
        temporary.replace(path)
    except Exception as error:
        reason = str(error).strip().splitlines()[:3]
        raise FuselineError(f"the rewritten program could not be saved: {type(error).__name__}", reason) from error
    finally:
        temporary.unlink(missing_ok=True)
