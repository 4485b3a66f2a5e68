"""`fuseline opt GRAPH.pt2|MODEL -p PIPELINE -o OUT.pt2`: a rewritten program as a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.utils._pytree as pytree
import typer

from fuseline.cli import options
from fuseline.cli.compiling import rewrite
from fuseline.cli.data import report_data
from fuseline.cli.environment import versions
from fuseline.cli.output import Output
from fuseline.cli.render import following, megabytes, show_passes
from fuseline.compiler.errors import FuselineError, UserError
from fuseline.compiler.outline import inline
from fuseline.compiler.pipeline import DEFAULT, Pipeline
from fuseline.compiler.program import Program
from fuseline.models import LoadedModel


def opt(
    model: options.Model,
    out: Annotated[str, typer.Option("--output", "-o", metavar="OUT.pt2", help="The file to write.")],
    pipeline: options.PipelineText = DEFAULT,
    dtype: options.Dtype = None,
    verify: options.Verification = None,
    json: options.Json = None,
) -> None:
    """Rewrite a model or a .pt2 program into a .pt2 file."""
    from fuseline.models import load, parse_dtype

    path = Path(out)
    if path.suffix != ".pt2":
        raise UserError(f"{out!r} does not end in .pt2", remedy=f"-o {path.with_suffix('.pt2')}")
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}")
    passes = Pipeline(pipeline)
    output = Output(json)
    loaded = load(model, parse_dtype(dtype))
    rewritten = rewrite(loaded, passes, verify)
    data: dict[str, Any] = {"model": model, "versions": versions(), **report_data(rewritten), "path": str(path)}
    show_passes(output, data)
    write_program(rewritten.program, loaded, path)
    output.line(f"\n{path}: {megabytes(path.stat().st_size)}; its fuseline ops load after `import fuseline`")
    following(output, f'fuseline run {path} -p "…"', "further passes over it")
    output.write(data)


class Standalone(torch.nn.Module):
    """A program with the values of its weights as buffers.

    It takes the captured call's tensors by position, keyword arguments after the others; what was no tensor (a flag)
    is fixed in the graph. It returns what the captured model returned.
    """

    def __init__(self, program: Program, loaded: LoadedModel):
        super().__init__()
        module, expressions = program.lift()
        assert program.examples is not None
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


def write_program(program: Program, loaded: LoadedModel, path: Path) -> None:
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
