"""`bits=auto:BUDGET`: a format for each site, so that the weights fit in so many bytes and the results change least.

    minimise   Σ cost(site, format)      over one format a site      with Σ bytes(site, format) ≤ budget

Costs are `sensitivity.py`'s; the choice is an integer program (scipy's milp, HiGHS), solved to within a thousandth, as
in HAWQ-V3 (Yao et al., 2021). The question is SDQ's too (Huang et al., 2022), which learns the choice. A weight that
several products read counts once for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...compiler.errors import UserError
from ...compiler.framework import Study
from ...compiler.plan import SitePlan
from ...compiler.rewriter import Rewriter
from ...compiler.schemes import Scheme
from ..quantize_sites import Site
from .budget import Budget
from .sensitivity import sensitivities
from .stream import check

if TYPE_CHECKING:
    from ..quantize import Quantize

GAP = 1e-3


def decide_formats(step: Quantize, study: Study, decided: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
    """The scheme of each site, what it costs and how many bytes it takes.

    Raises:
        UserError: the budget is less than the smallest formats take.
    """
    check(study.program, study.data)
    rewriter = Rewriter(study.program, step.name)
    sites = list(step.admitted(study.program))
    fitting = [
        [s for s in step.candidates(site.path) if s.refuse(site.shape[1], site.shape[0]) is None] for site in sites
    ]
    costs = sensitivities(study.program, sites, fitting, study.data)
    sizes = [[stored(site, scheme) for scheme in schemes] for site, schemes in zip(sites, fitting, strict=True)]
    weights = sum(site.shape[0] * site.shape[1] for site in sites)
    now = sum(site.shape[0] * site.shape[1] * _width(site) for site in sites)
    budget = Budget.parse(step.bits or "").bytes(weights, now)
    least = sum(map(min, sizes))
    if sites and least > budget:
        raise UserError(
            f"bits={step.bits} is {budget / 1e6:.4g} MB, and {len(sites)} sites take {least / 1e6:.4g} MB at the least",
            ["scales and zero points count: larger groups have fewer of them"],
            f"bits=auto:{8 * least / weights + 0.005:.2f}bits, or more",
        )
    chosen = allot(costs, sizes, budget) if sites else []
    plans = {}
    for site, schemes, cost, size, j in zip(sites, fitting, costs, sizes, chosen, strict=True):
        structure = {
            "scheme": str(schemes[j]),
            "cost": cost[j],
            "bytes": size[j],
            "count": site.shape[0] * site.shape[1],
        }
        plans[rewriter.site(site.node)] = SitePlan(structure)
    return plans


def allot(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> list[int]:
    """For each row the choice, so that the sum of the costs is least and the sizes fit the budget.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        raise UserError(
            "bits=auto solves an integer program with scipy, which is not installed", remedy="pip install scipy"
        ) from None
    owner = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    flat, size = (np.concatenate([np.asarray(row, float) for row in rows]) for rows in (costs, sizes))
    scale = flat.max() or 1.0
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    found = milp(
        flat / scale,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / budget, 0, 1)],
        options={"mip_rel_gap": GAP, "time_limit": 60},
    )
    if found.x is None:
        raise UserError("no choice of formats fits the budget", [found.message], "a larger budget, or more formats")
    starts = np.concatenate(([0], np.cumsum([len(row) for row in costs])[:-1]))
    return [int(np.argmax(found.x[s : s + len(row)])) for s, row in zip(starts, costs, strict=True)]


def stored(site: Site, scheme: Scheme) -> float:
    """Bytes of a site's codes, scales and zero points."""
    return site.shape[0] * site.shape[1] * scheme.bytes_per_weight(site.shape[1], 2 if _width(site) == 2 else 4)


def _width(site: Site) -> int:
    return int(site.node.meta["val"].dtype.itemsize)
