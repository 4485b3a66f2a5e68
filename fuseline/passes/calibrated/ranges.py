"""`activations=…:static`: the range of what each product reads, in the program as it is, unrounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch.fx import Node

from ...compiler.framework import Study
from ...compiler.plan import SitePlan
from ...compiler.progress import steps
from ..quantize_sites import Site
from .inputs import finite
from .methods import Method
from .observers import Observer, scale_of
from .scales import fold_scales
from .sites_after import sites_after
from .stream import Stream

if TYPE_CHECKING:
    from ..quantize import Quantize


def decide_ranges(step: Quantize, study: Study, decided: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
    """Each site's `input_scale` and `input_zero`; where channels are scaled first, those are what is looked at."""
    scaled = step.method in (Method.AWQ, Method.SMOOTH)
    change = lambda program, rewriter: fold_scales(step, program, rewriter) if scaled else None
    program, found, name_of = sites_after(step, study, decided, change)
    scheme = step.schemes()["activations"]
    assert scheme is not None
    observer, groups = Observer.parse(step.observe), dict[Node, list[Site]]()
    for site in found:
        groups.setdefault(site.x, []).append(site)
    made: dict[str, SitePlan] = {}
    stream = Stream(program, study.data, step.offload)
    stops = stream.stops([tuple(group) for group in groups.values()])
    for stop in steps(stops, "observing ranges", total=len(groups)):
        name = name_of[stop.sites[0].node]
        low, high = observer.range(finite(stop.x(), name), scheme.symmetric)
        for site in stop.sites:
            made[name_of[site.node]] = SitePlan({"range": [low, high]}, scale_of(low, high, scheme))
    return made
