"""The sites that are decided, in the program as they will meet it, by the names that the plan gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch.fx import Node

from ...compiler.framework import Study
from ...compiler.plan import SitePlan
from ...compiler.program import Program
from ...compiler.rewriter import Rewriter
from ..quantize_sites import Site

if TYPE_CHECKING:
    from ..quantize import Quantize


def sites_after(
    step: Quantize, study: Study, decided: Mapping[str, SitePlan], change: Callable[[Program, Rewriter], object]
) -> tuple[Program, list[Site], dict[Node, str]]:
    """A copy of the program after `change`, its sites in graph order, and their names by node.

    A name is that of the site before the change, under which the plan is looked up. decided: by such a name, what the
    change may read.
    """
    program = study.program.copy()
    rewriter = Rewriter(program, step.name)
    rewriter.decisions = decided
    names = [rewriter.site(site.node) for site in step.admitted(program)]
    change(program, rewriter)
    found = list(step.admitted(program))
    return program, found, {site.node: name for site, name in zip(found, names, strict=True)}
