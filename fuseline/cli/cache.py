"""`fuseline cache`: where compiled code is kept, how much of it, and why something had to be compiled again.

`fuseline cache path|size|clear` are for scripts and for the disk: the folder, its bytes by kind, and removing it.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from fuseline.cli import options
from fuseline.cli.output import Output
from fuseline.cli.render import following, megabytes, place, shorten_ops, table
from fuseline.compiler.errors import FuselineError, UserError, nearest
from fuseline.runtime.cache import KERNELS, Cache
from fuseline.runtime.entry import Entry, differences
from fuseline.runtime.housekeeping import folder_bytes, remove
from fuseline.runtime.kernel_store import versions
from fuseline.runtime.location import cache_root, modules_root
from fuseline.runtime.tensor_store import tensor_cache

ACTIONS = ("path", "size", "clear")
FETCHED = "fetched models"
DECOMPOSED = "decompositions"


def cache(
    action: Annotated[
        str | None, typer.Argument(metavar="path|size|clear", help="Print the folder; its bytes; empty it.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="The same as clear: fetched models stay.")] = False,
    models: Annotated[bool, typer.Option("--models", help="clear fetched models, too.")] = False,
    why: Annotated[str | None, typer.Option(metavar="KERNEL", help="Why this kernel was compiled, each time.")] = None,
    json: options.Json = None,
) -> None:
    """Show, explain or clear what compiled code is kept."""
    output, store = Output(json), Cache()
    if action is not None and action not in ACTIONS:
        raise UserError(f"unknown action {action!r}{nearest(action, ACTIONS)}", remedy="fuseline cache size")
    clear = clear or action == "clear"
    if why is not None and (clear or action):
        raise UserError(f"{action or '--clear'} and --why cannot be given together")
    if models and not clear:
        raise UserError("--models goes with clear", remedy="fuseline cache clear --models")
    if why is not None:
        data = explain(store, why, output)
    elif clear:
        data = _clear(store, output, models)
    elif action == "path":
        output.console.print(str(cache_root()), soft_wrap=True)
        data = {"path": str(cache_root())}
    else:
        data = sizes(store, output) if action == "size" else show(store, output)
    output.write(data)


def sizes(store: Cache, output: Output) -> dict[str, Any]:
    """Bytes by kind, fetched models among them, and their sum; nothing is read but the folders."""
    found = {kind.name: _bytes_of(kind) for kind in sorted(store.directory.glob("*")) if kind.is_dir()}
    found["modules"] = sum(path.stat().st_size for path in _modules())
    found[DECOMPOSED] = _bytes_of(tensor_cache().directory)
    found[FETCHED] = sum(_bytes_of(path) for path in _fetched())
    total = sum(found.values())
    table(output, ["kind", "size"], [[kind, _bytes(count)] for kind, count in found.items()])
    output.line(f"{_bytes(total)} in {cache_root()}")
    return {"path": str(cache_root()), "bytes": found, "total": total}


def show(store: Cache, output: Output) -> dict[str, Any]:
    """Path, number and bytes of entries by kind, and what is damaged."""
    counts, sizes, damaged, first = Counter[str](), Counter[str](), [], None
    for entry in store.entries():
        if isinstance(entry, Entry):
            first = first or entry.name
            counts[entry.kind] += 1
            sizes[entry.kind] += folder_bytes(entry.path)
        else:
            damaged.append({"path": str(entry[0]), "reason": str(entry[1])})
    modules = _modules()
    counts["modules"] = sum(path.suffix == ".py" for path in modules)
    sizes["modules"] = sum(path.stat().st_size for path in modules)
    tensors = tensor_cache()
    counts[DECOMPOSED] = sum(isinstance(entry, Entry) for entry in tensors.entries())
    sizes[DECOMPOSED] = _bytes_of(tensors.directory)
    root, limit = cache_root(), store.limit
    output.line(f"{root}    (FUSELINE_CACHE)")
    output.line(f"at most {_bytes(limit)} of compiled code, the least recently used goes first (FUSELINE_CACHE_SIZE)")
    rows = [[kind, str(counts[kind]), _bytes(sizes[kind])] for kind in sorted({KERNELS, *counts})]
    table(output, ["kind", "entries", "size"], rows)
    for item in damaged:
        output.line(f"damaged, and replaced when it is needed: {item['path']}: {item['reason']}")
    if first is not None:
        following(output, f"fuseline cache --why {first}", "why it was compiled")
    kinds = {kind: {"entries": counts[kind], "bytes": sizes[kind]} for kind in sorted({KERNELS, *counts})}
    return {"path": str(root), "limit": limit, "kinds": kinds, "damaged": damaged}


def explain(store: Cache, name: str, output: Output) -> dict[str, Any]:
    """Each stored binary of a kernel: when it was made, for what, why; and which versions here are others."""
    entries = [e for e in store.entries() if isinstance(e, Entry)]
    mine = sorted((e for e in entries if e.name == name), key=lambda e: e.made)
    if not mine:
        raise UserError(f"the cache has no kernel {name!r}{nearest(name, {e.name for e in entries})}")
    data = []
    for entry in mine:
        stored = {package: entry.fields.get(package) for package in versions()}
        other = differences(stored, versions())
        data.append(
            {
                "made": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(entry.made)),
                "target": entry.fields.get("target"),
                "because": entry.because,
                "about": entry.about,
                "other_versions": {package: {"stored": a, "here": b} for package, (a, b) in other.items()},
                "fields": entry.fields,
                "path": str(entry.path),
            }
        )
        output.line(f"{data[-1]['made']}  {entry.fields.get('target')}  {entry.path.name}")
        output.line(f"  compiled because: {entry.because or 'it was asked for'}")
        if entry.about:
            output.line(
                f"  computes: {shorten_ops(entry.about.get('ops', []))}, for {place(entry.about.get('lines', []))}"
            )
            output.line(f"  made by: {', '.join(entry.about.get('made_by', [])) or 'capture alone'}")
        for package, (a, b) in other.items():
            output.line(f"  not used here: {package} {a} stored, {b} here")
    return {"name": name, "entries": data}


def _clear(store: Cache, output: Output, models: bool) -> dict[str, Any]:
    modules = _modules()
    count = sum(path.suffix == ".py" for path in modules)
    try:
        entries, tensors = store.clear(), tensor_cache().clear()
    except OSError as error:
        raise FuselineError("the cache cannot be cleared", [str(error)], "remove the folder by hand") from error
    left = [path for path in modules if not remove(path)]
    if left:
        raise FuselineError("the cache cannot be cleared", [f"{left[0]} cannot be removed"])
    output.line(f"removed {entries} binaries of kernels and {count} generated modules from {cache_root()}")
    if tensors:
        output.line(f"removed {tensors} decompositions of weights, which analyses compute again")
    removed = {"entries": entries, "modules": count, "decompositions": tensors}
    if models:
        fetched = _fetched()
        freed = sum(_bytes_of(path) for path in fetched)
        left = [path for path in fetched if not remove(path)]
        if left:
            raise FuselineError("the cache cannot be cleared", [f"{left[0]} cannot be removed"])
        output.line(f"removed {len(fetched)} files and folders of fetched models, {_bytes(freed)}")
        removed["models"] = len(fetched)
    return {"path": str(cache_root()), "removed": removed}


def _fetched() -> list[Path]:
    """What lies in the cache beside compiled code: models that were fetched or converted."""
    root = cache_root()
    return sorted(
        path for path in root.glob("*") if path not in (Cache().directory, modules_root(), tensor_cache().directory)
    )


def _bytes_of(path: Path) -> int:
    """Of a file, or of all files below a folder; 0 where there is neither."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(p.stat().st_size for p in files if p.is_file())


def _modules() -> list[Any]:
    """The files of generated modules."""
    return [p for p in modules_root().glob("fuseline_*") if p.suffix in (".py", ".json") and p.is_file()]


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else megabytes(count)
