"""Emits a corpus into a folder of plain text, free of what differs between two runs of the same code.

    <case>/capture.txt          the graph before the pipeline: a difference here is none of codegen's
    <case>/kernels/<name>.py    a kernel: its launch options, argument types, constants and source
    <case>/module.py            the generated module without the kernels' bodies
    <case>/manifest.json        the manifest, without paths
    <case>/error.txt            in the place of these three, why nothing was emitted

A script too: `python record.py CASES.json FOLDER ROOT` runs against the package at ROOT, which may be another commit's.
So it imports nothing but names that have been there from the start, and no other file of this folder.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

DONE = "recorded "  # what the script prints, with the case's folder, after each case


def record(cases: Iterable[Mapping[str, str]], folder: Path, done: Callable[[str], None] = lambda case: None) -> None:
    """Emits each case (`folder`, `model`, `pipeline`); a model is captured once for all its pipelines."""
    captured: tuple[str, Any] = ("", None)
    for case in cases:
        place = folder / case["folder"]
        place.mkdir(parents=True)
        try:
            if captured[0] != case["model"]:
                captured = ("", None)  # two at a time would cost memory
                captured = (case["model"], capture(case["model"]))
            (place / "capture.txt").write_text(f"{captured[1].graph}\n", encoding="utf-8")
            write(emit(captured[1], case["pipeline"]), place)
        except Exception as error:  # a model that is refused, on either side, is part of the record
            first = (str(error).splitlines() or [""])[0]
            (place / "error.txt").write_text(f"{type(error).__name__}: {without_folders(first)}\n", encoding="utf-8")
        done(case["folder"])


def capture(model: str) -> Any:
    """The program of a MODEL, or of a row of tests/families."""
    kind, _, name = model.partition(":")
    if kind != "family":
        from fuseline.cli.compiling import capture_model
        from fuseline.models import load

        return capture_model(load(model))
    import torch

    import fuseline
    from tests.families.registry import ROWS  # type: ignore[import-not-found]

    torch.manual_seed(0)
    return fuseline.capture(ROWS[name].model(), (), ROWS[name].inputs(2, 1))


def emit(program: Any, pipeline: str) -> Any:
    """The program through the pipeline, lowered."""
    from fuseline.codegen.lower import lower
    from fuseline.compiler.pipeline import Pipeline

    after, _ = Pipeline(pipeline).run(program)
    return lower(after)


def write(lowered: Any, place: Path) -> None:
    """Writes a lowered program as text."""
    kernels = place / "kernels"
    kernels.mkdir()
    module = lowered.source
    for kernel in lowered.kernels:
        (kernels / f"{kernel.name}.py").write_text(kernel_text(kernel), encoding="utf-8")
        module = module.replace(kernel.source, f"def {kernel.name}(…): …\n")
    (place / "module.py").write_text(module, encoding="utf-8")
    manifest = json.dumps(plain(lowered.manifest()), indent=1, ensure_ascii=False)
    (place / "manifest.json").write_text(manifest + "\n", encoding="utf-8")


def kernel_text(kernel: Any) -> str:
    """All that makes a kernel the program that it is, one thing a line."""
    head = [f"# {kernel.num_warps} warps, {kernel.num_stages} stages"]
    for name, kind in kernel.signature.items():
        value = f" = {kernel.constants[name]!r}" if name in kernel.constants else ""
        head.append(f"# {name}: {kind}{value}")
    return "\n".join([*head, kernel.source.rstrip("\n")]) + "\n"


def plain(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without the digest of its module, which differs wherever the module does, and without folders."""
    kept = {key: value for key, value in manifest.items() if key != "module"}
    if isinstance(kept.get("files"), dict):
        kept["files"] = {name: len(paths) for name, paths in kept["files"].items()}
    return kept


def without_folders(text: str) -> str:
    """`no file /tmp/x/y.py` → `no file y.py`."""
    return re.sub(r"(?<![\w.])(?:/[\w.@+-]+)*/(?=[\w.@+-])", "", text)


def main() -> None:
    cases, folder, root = sys.argv[1:]
    package = importlib.util.find_spec("fuseline")
    found = Path(str(package.origin if package else None)).resolve().parent.parent
    if found != Path(root).resolve():
        sys.exit(f"the package came from {found}, not from {root}")
    said = lambda case: print(DONE + case, flush=True)
    record(json.loads(Path(cases).read_text(encoding="utf-8")), Path(folder), said)


if __name__ == "__main__":
    main()
