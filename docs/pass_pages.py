"""A page for each pass, from its docstring, its options, and what it makes of a small block: a graph before and after.

A pass of another folder or package gets its page by itself: there is no list. Where a pass finds nothing to do in the
block, or needs what a documentation build has not (several processes), the page says so in the graph's place.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from drawing import draw

import fuseline
from fuseline.cli.passes import describe
from fuseline.compiler import registry
from fuseline.compiler.errors import FuselineError
from fuseline.compiler.recipes import recipes
from fuseline.models.decoder import TinyDecoder


def block() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """One layer of a decoder with grouped queries, and two short sequences."""
    torch.manual_seed(0)
    ids = torch.arange(32).reshape(2, 16) % 64
    return TinyDecoder(vocabulary=64, hidden=64, layers=1).eval().requires_grad_(False), (ids,)


def pass_pages() -> dict[str, str]:
    """File name → page, for every registered pass of this package."""
    own = [kind for kind in registry.available().values() if kind.__module__.startswith("fuseline.")]
    pages = {f"passes/{kind.name}.md": page(kind) for kind in own}
    rows = "".join(
        f"| [`{k.name}`]({k.name}.md) | {k.tier.value} | {k.level.value} | {describe(k)['summary']} |\n" for k in own
    )
    named = "".join(f"| `{r.name}` | {r.summary} | `{r.pipeline}` |\n" for r in recipes().values())
    pages["passes/index.md"] = (
        "# Passes\n\nA page each, from the docstring of the pass; `fuseline passes NAME` prints the same.\n\n"
        f"| pass | tier | level | what it does |\n|---|---|---|---|\n{rows}\n"
        "Every pass also takes `allow_empty` (to match no site is then no error) and `expect`: fewer rewrites than\n"
        "`raise{expect=181}`, or than `raise{expect=RMSNorm:61|Attention:30}` says, are an error.\n\n"
        f"## Recipes\n\n| recipe | what it is for | passes |\n|---|---|---|\n{named}"
    )
    return pages


def page(kind: type[fuseline.Pass]) -> str:
    facts = describe(kind)
    rows = "".join(
        f"| `{o['name']}` | {str(o['type']).replace('|', ' or ')} | `{o['default']}` | {o['help']} |\n"
        for o in facts["options"]
        if o["name"] not in ("allow_empty", "expect")
    )
    options = f"| option | values | default | |\n|---|---|---|---|\n{rows}" if rows else "No options of its own.\n"
    source = kind.__module__.replace(".", "/")
    return (
        f"# {facts['name']}\n\n{facts['summary']}. Tier: {facts['tier']}. Level: {facts['level']}. "
        f"Code: `{source}`.\n\n```text\n{facts['page']}\n```\n\n## Options\n\n{options}\n"
        f"## Before and after\n\n{graphs(facts['example'], facts['name'])}\n"
        f'## Try it\n\n```text\nfuseline run demo:smollm2 -p "{facts["example"]}"\n'
        f'fuseline diff demo:tiny-llama -p "{facts["example"]}"\nfuseline passes {facts["name"]}\n```\n'
    )


def graphs(example: str, name: str) -> str:
    """What the pass makes of the block, as two pictures: the program that reaches it, and the one that leaves it."""
    try:
        model, args = block()
        program = fuseline.capture(model, args)
        named = fuseline.Pipeline(example).passes
        raised = name == "raise" or any(step.name == "raise" for step in named)
        passes = named if raised else (*fuseline.Pipeline("raise").passes, *named)  # smaller to look at
        at = next(n for n, step in enumerate(passes) if step.name == name)
        lead = fuseline.Pipeline(list(passes[:at])) if at else None
        before = lead.run(program, plan=plan_of(lead, program))[0] if lead else program
        after, report = through(fuseline.Pipeline(list(passes[at : at + 1])), before)
    except (FuselineError, StopIteration, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"No picture: in a block of one process, {reason}.\n"
    known = {n.name for n in before.graph.nodes}
    made = frozenset(n.name for n in after.graph.nodes) - known
    gone = frozenset(known - {n.name for n in after.graph.nodes})
    rules = ", ".join(f"{count} {rule}" for rule, count in report[name].rules.items())
    return (
        f"One decoder layer under `{fuseline.Pipeline(passes)}`: what reaches `{name}`, and what leaves it. `w` is a "
        f"weight; outlined is what was taken, and what was made. Rewrites: {rules or report[name].matched}.\n\n"
        f'<div class="graphs" markdown="0"><figure><figcaption>before</figcaption>{draw(before, gone)}</figure>'
        f"<figure><figcaption>after {name}</figcaption>{draw(after, made)}</figure></div>\n"
    )


def plan_of(pipeline: Any, program: Any) -> Any:
    if not pipeline.needs_data:
        return None
    from fuseline.calibrate import flat_arguments

    calls = [((torch.randint(0, 64, (2, 16)),), {}) for _ in range(4)]
    return pipeline.analyze(program, flat_arguments(program, calls))


def through(pipeline: Any, program: Any) -> Any:
    return pipeline.run(program, plan=plan_of(pipeline, program))


def title(text: str) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else "Untitled"
