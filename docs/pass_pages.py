"""A page for each pass, from its docstring, its options, and what it makes of a small model: a graph before and after.

A pass of another folder or package gets its page by itself: there is no list. Of a few small models the first is drawn
that the pass finds something in; a process group of PyTorch's that sends nothing stands for the other processes. Where
there is still nothing to draw, the page says why in the graph's place.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from drawing import draw
from generate import option_table
from torch.nn import functional as F

import fuseline
from fuseline.cli.memory import memory
from fuseline.cli.passes import describe
from fuseline.compiler import registry
from fuseline.compiler.errors import FuselineError
from fuseline.compiler.recipes import recipes
from fuseline.models.decoder import TinyDecoder
from fuseline.models.encoder import TinyEncoder
from fuseline.models.mixture import TinyMixture

WORLD = 4
STEP = "demo:tiny-decoder"
Model = tuple[torch.nn.Module, tuple[torch.Tensor, ...]]


def decoder() -> Model:
    """With grouped queries, and two short sequences."""
    torch.manual_seed(0)
    ids = torch.arange(32).reshape(2, 16) % 64
    return TinyDecoder(vocabulary=64, hidden=64, layers=1).eval().requires_grad_(False), (ids,)


class WithLoss(torch.nn.Module):
    """ids, labels [B, T] → the mean cross-entropy of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyDecoder(vocabulary=8192, hidden=64, layers=1)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.body(ids)[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def encoder() -> Model:
    torch.manual_seed(0)
    return TinyEncoder(hidden=64, layers=1).eval().requires_grad_(False), (torch.randn(2, 16, 48),)


def training() -> Model:
    torch.manual_seed(0)
    ids = torch.arange(32).reshape(2, 16)
    return WithLoss(), (ids, ids)


def experts() -> Model:
    torch.manual_seed(0)
    ids = torch.arange(32).reshape(2, 16)
    return TinyMixture(64, hidden=64, inner=64, layers=1, experts=4).eval().requires_grad_(False), (ids,)


MODELS: dict[str, Callable[[], Model]] = {
    "One decoder layer": decoder,
    "One decoder layer and the loss": training,
    "One layer of routed experts": experts,
    "One encoder layer": encoder,
}


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """A process group of which this process is the first, and no other exists."""
    if not dist.is_available():
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()


def pass_pages() -> dict[str, str]:
    """File name → page, for every registered pass of this package."""
    own = [kind for kind in registry.available().values() if kind.__module__.startswith("fuseline.")]
    with processes():
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
    options = option_table(facts["options"])
    source = kind.__module__.replace(".", "/")
    text = "\n".join(facts["page"].splitlines()[1:]).strip("\n")  # the first line is the summary
    measured = any(command.startswith("fuseline memory") for command in facts["trials"])
    drawn = timelines(facts["name"]) if measured else graphs(facts["example"], facts["name"])
    commands = "\n".join([*facts["trials"], f"fuseline passes {facts['name']}"])
    return (
        f"# {facts['name']}\n\n{facts['summary']}. Tier: {facts['tier']}. Level: {facts['level']}. "
        f"Code: `{source}`.\n\n```text\n{text}\n```\n\n## Options\n\n{options}\n"
        f"## Before and after\n\n{drawn}\n"
        f"## Try it\n\n```text\n{commands}\n```\n"
    )


def graphs(example: str, name: str) -> str:
    """What the pass makes of a small model: the program that reaches it, and the one that leaves it."""
    refused = []
    for what, make in MODELS.items():
        try:
            return picture(what, make, example, name)
        except (FuselineError, StopIteration, RuntimeError, NotImplementedError) as error:
            refused.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    return f"No picture: {refused[0]}.\n"


def timelines(name: str) -> str:
    """Memory over a training step without the pass and with it, as `fuseline memory` draws it."""
    pictures = []
    for pipeline in (f"{name}{{policy=none}}", name):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
            file = Path(folder) / "memory.svg"
            memory(STEP, pipeline, seq=8192, limit="80GB", device="h100", rows=1, points=0, plot=str(file))
            pictures.append(file.read_text(encoding="utf-8"))
        assert "peak" in said.getvalue()
    before, after = pictures
    return (
        f"Memory over a training step of `{STEP}` on 8,192 tokens, as `fuseline memory --plot` draws it.\n\n"
        f'<div class="graphs" markdown="0"><figure><figcaption>all is kept</figcaption>{before}</figure>'
        f"<figure><figcaption>{name}</figcaption>{after}</figure></div>\n"
    )


def picture(what: str, make: Callable[[], Model], example: str, name: str) -> str:
    model, args = make()
    program = fuseline.capture(model, args)
    named = fuseline.Pipeline(example).passes
    raised = name == "raise" or any(step.name == "raise" for step in named)
    passes = named if raised else (*fuseline.Pipeline("raise").passes, *named)  # smaller to look at
    at = next(n for n, step in enumerate(passes) if step.name == name)
    lead = fuseline.Pipeline(list(passes[:at])) if at else None
    before = lead.run(program, plan=plan_of(lead, program))[0] if lead else program
    after, report = through(fuseline.Pipeline(list(passes[at : at + 1])), before)
    known = {n.name for n in before.graph.nodes}
    made = frozenset(n.name for n in after.graph.nodes) - known
    gone = frozenset(known - {n.name for n in after.graph.nodes})
    rules = ", ".join(f"{count} {rule}" for rule, count in report[name].rules.items())
    exchanges = any(str(n.target).startswith("_c10d_functional") for n in after.graph.nodes)
    where = f", in process 0 of {WORLD}" if exchanges else ""
    return (
        f"{what} under `{fuseline.Pipeline(passes)}`{where}: what reaches `{name}`, and what leaves it. `w` is a "
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
