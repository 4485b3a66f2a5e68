"""`fuseline cache`: where compiled code is kept, how much of it, and why something had to be compiled again."""

from __future__ import annotations

import time
from collections import Counter
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


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of it (models that were fetched stay).")] = False,
    why: Annotated[str | None, typer.Option(metavar="KERNEL", help="Why this kernel was compiled, each time.")] = None,
    json: options.Json = None,
) -> None:
    """Show, explain or clear what compiled code is kept."""
    output, store = Output(json), Cache()
    if clear and why is not None:
        raise UserError("--clear and --why cannot be given together")
    data = explain(store, why, output) if why is not None else _clear(store, output) if clear else show(store, output)
    output.write(data)


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


def _clear(store: Cache, output: Output) -> dict[str, Any]:
    modules = _modules()
    count = sum(path.suffix == ".py" for path in modules)
    try:
        entries = store.clear()
    except OSError as error:
        raise FuselineError("the cache cannot be cleared", [str(error)], "remove the folder by hand") from error
    left = [path for path in modules if not remove(path)]
    if left:
        raise FuselineError("the cache cannot be cleared", [f"{left[0]} cannot be removed"])
    output.line(f"removed {entries} binaries of kernels and {count} generated modules from {cache_root()}")
    return {"path": str(cache_root()), "removed": {"entries": entries, "modules": count}}


def _modules() -> list[Any]:
    """The files of generated modules."""
    return [p for p in modules_root().glob("fuseline_*") if p.suffix in (".py", ".json") and p.is_file()]


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else megabytes(count)
