"""The options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="demo:smollm2, hf:DIR, gguf:FILE, py:MODULE:F, FILE.pt2.")]
Graph = Annotated[
    str, typer.Argument(metavar="GRAPH", help="A MODEL, a .pt2 file, or a dumped stage (DIR/001_raise.py).")
]
PipelineText = Annotated[
    str,
    typer.Option(
        "--pipeline", "-p", metavar="PIPELINE", help="Passes, a recipe, or a .toml file.",
        show_default="raise,fuse-loss,fuse, where they apply",
    ),
]  # fmt: skip
RequiredPipeline = Annotated[
    str, typer.Option("--pipeline", "-p", metavar="PIPELINE", help="Passes, a recipe, or a .toml file.")
]
Plan = Annotated[str | None, typer.Option("--plan", metavar="PLAN", help="What `fuseline analyze` decided.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the data; - for standard output.")]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16, float16, float64.")]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu or cuda.")]
Target = Annotated[str | None, typer.Option("--target", metavar="T", help="eager, inductor or triton.")]
Dump = Annotated[str | None, typer.Option("--dump", metavar="DIR", help="Write the program after each pass.")]
Prove = Annotated[bool, typer.Option("--prove", help="Prove each rewrite of passes that are algebra.")]
Verification = Annotated[
    str | None, typer.Option("--verify", metavar="[=LEVEL]", help="Check exact passes' errors; full: all values; off.")
]
