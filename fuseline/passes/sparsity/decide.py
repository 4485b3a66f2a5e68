"""What `rsparse` decides from data: thresholds, and how the bytes are divided."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...compiler.errors import UserError
from ...compiler.expand import EXPANSIONS
from ...compiler.framework import Study
from ...compiler.plan import SitePlan
from ...compiler.planned import probe
from ...compiler.program import Program
from ...compiler.progress import steps
from ...compiler.sites import sites as site_names
from ..quantize_sites import heads
from ..rotation.learning.losses import Loss, criterion
from .budgets import Budgets, Choice, Choices, Shares, sensitivity, split, within
from .curves import Curve, curves, ranks
from .factors import NOMINAL, Factors, LowRank, low_rank
from .greedy import greedy
from .groups import Group, groups
from .options import LowRankUse, Score
from .samples import check, samples
from .search import Candidate, Found, Losses, evolve
from .selection import gain, parted
from .slopes import Slopes
from .trial import Judge, Mask

if TYPE_CHECKING:
    from . import RSparse

MODEL = ""
"""The site in a plan for what holds for the whole model."""


class Decision:
    """All that one analysis finds out, each part when it is asked for.

    A comparison sets another `step`, of the same score and factors, and asks again: activations are read once.
    """

    def __init__(self, step: RSparse, study: Study):
        self.step, self.study, self.program = step, study, study.program
        names = site_names(self.program.graph)
        found, refused = groups(self.program, names, step.only, step.skip)
        if not found:
            raise _nothing(self.program, list(dict.fromkeys(refused.values())))
        self.samples, dull = samples(self.program, found, study.data, step.score is Score.NORM_WEIGHTED)
        self.refused = {names[site.node]: reason for site, reason in refused.items()}
        self.refused |= {name: reason for group, reason in dull.items() for name in group.names}
        over_vocabulary = heads(self.program)
        counted = [site for site in refused if site.kernel is None and site.node not in over_vocabulary]
        itemsize = found[0].itemsize
        self.dense = sum(site.shape[0] * site.shape[1] for site in counted) * itemsize
        self.dense += sum(group.bytes for group in dull)
        self.groups = list(self.samples)
        if not self.groups:
            raise _nothing(self.program, list(dict.fromkeys(dull.values())))
        self.factors: dict[Group, LowRank] = {}
        self._curves: dict[Group, Curve] | None = None
        self._judges: dict[int, Judge] = {}
        self._greedy: dict[float, Shares] = {}

    def factor(self, group: Group, rank: int) -> LowRank:
        """The factors of a group, of this rank at least."""
        known = self.factors.get(group)
        if known is None or len(known.down) < rank:
            sample, parameter = self.samples[group], self._parameter
            weight = torch.cat([site.weight.evaluate(parameter).detach() for site in group.sites])
            dropped = None
            if self.step.factors is Factors.DATA:
                dropped = sample.x.masked_fill(~sample.dropped(NOMINAL), 0)
            known = self.factors[group] = low_rank(weight, dropped, rank, self.study.results, group.name)
        return known

    def curves(self) -> dict[Group, Curve]:
        """What each group costs, by fraction and rank."""
        if self._curves is None:
            if self.step.low_rank is not LowRankUse.OFF:
                for group in steps(self.groups, "decomposing weights"):
                    if widest := max(ranks(group)):
                        self.factor(group, widest)
            self._curves = curves(self.program, self.samples, self.factors, self.study.data, self.step.seed)
        return self._curves

    def judge(self, calls: int) -> Judge:
        """The loss of the whole model on so many calls, spread evenly over the calibration data."""
        if calls not in self._judges:
            measure = criterion(Loss.AUTO, self.program)
            self._judges[calls] = Judge(self.program, measure, parted(self.study.data, calls)[0])
        return self._judges[calls]

    def choose(self) -> tuple[Choices, dict[str, Any]]:
        """Fractions and ranks for the step's budget, and what was measured on the way."""
        step = self.step
        share = within(self.groups, step.budget, self.dense)
        check(self.samples, share)
        record: dict[str, Any] = {"share": share}
        if step.budgets is Budgets.SEARCHED:
            choices, found = self._search(share)
            record |= found
        elif step.budgets is Budgets.GREEDY:
            choices = self._split(self.greedy(share))
        elif step.budgets is Budgets.SENSITIVITY:
            choices = self._split(sensitivity(self._plain(), share))
        else:
            choices = self._split(dict.fromkeys(self.groups, share))
        return self._resolved(choices), record

    def _resolved(self, choices: Choices) -> Choices:
        return {g: Choice(self.samples[g].resolved(choice.fraction), choice.rank) for g, choice in choices.items()}

    def masks(self, choices: Mapping[Group, Choice]) -> dict[Group, Mask]:
        """What the choices do to each group's input."""
        found = {}
        for group, choice in choices.items():
            threshold = self.samples[group].threshold(choice.fraction)
            if not choice.rank:
                found[group] = Mask(threshold)
                continue
            factors = self.factor(group, choice.rank).first(choice.rank)
            ups = factors.up.split([site.shape[0] for site in group.sites], 1)
            found[group] = Mask(threshold, factors.down, tuple(up.contiguous() for up in ups))
        return found

    def greedy(self, share: float) -> Shares:
        """TEAL's shares."""
        if share not in self._greedy:
            few = self.study.data[: self.step.calls]
            self._greedy[share] = greedy(self.program, self.samples, few, share)
        return self._greedy[share]

    def _plain(self) -> dict[Group, Curve]:
        """The curves of the splits that the options leave open."""
        made = self.curves()
        if self.step.ratio is None and self.step.low_rank is not LowRankUse.OFF:
            return made
        return {group: Curve(group, (0,), curve.costs[:, :1]) for group, curve in made.items()}

    def _split(self, shares: Shares) -> Choices:
        """Shares divided among channels and the branch as the options say."""
        step = self.step
        if step.low_rank is LowRankUse.OFF or step.ratio == 1:
            return {group: Choice(share) for group, share in shares.items()}
        if step.ratio is None:
            return split(shares, self.curves(), {})
        found = {}
        for group, share in shares.items():
            rank = round((1 - step.ratio) * share * group.n * group.m / (group.n + group.m))
            fixed = Choice(share - rank * (group.n + group.m) / (group.n * group.m), rank)
            found[group] = (
                fixed if step.low_rank is LowRankUse.ON or not rank or self._pays(group, share, rank) else Choice(share)
            )
        return found

    def _pays(self, group: Group, share: float, rank: int) -> bool:
        """Whether a branch costs less than channels for its bytes, by the rank that was measured and is nearest."""
        curve = self.curves()[group]
        nearest = min(curve.ranks, key=lambda r: abs(r - rank))
        return bool(nearest) and curve.at(curve.fraction(share, nearest), nearest) < curve.at(share, 0)

    def _search(self, share: float) -> tuple[Choices, dict[str, Any]]:
        step, made = self.step, self._plain()
        starts = {"uniform": Candidate(dict.fromkeys(self.groups, share), {})}
        if step.low_rank is LowRankUse.AUTO:
            never = dict.fromkeys(self.groups, math.inf)
            channels = {group: Curve(group, (0,), curve.costs[:, :1]) for group, curve in made.items()}
            starts["channels alone"] = Candidate(sensitivity(channels, share), never)
        judge = self.judge(step.calls)
        slopes = Slopes(self.program, self.samples, judge.measure, judge.data, judge.before)

        def sloped(choices: Choices) -> tuple[float, dict[Group, float]]:
            able = self._resolved(choices)
            return slopes(able, self.masks(able))

        of = f"{step} keeping {share:.6f} on data {self.study.digest()}"
        losses = Losses(self.study.checkpoint, of, lambda choices: judge(self.masks(self._resolved(choices))), sloped)
        try:
            found = evolve(starts, made, share, losses, step.trials, step.seed)
        except BaseException:
            losses.write()
            raise
        losses.close()
        best, held_out = self._settled(found, made)
        again = {"again": min(one.loss for one in found.rounds[1:])} if found.rounds[1:] else {}
        measured = {"sensitivity": found.rounds[0].loss, **again}
        measured |= {name: one.loss for name, one in found.starts.items()}
        measured["searched"] = found.candidates[0].loss
        record = {"measured": measured, "history": found.history, "losses": found.losses, "held_out": held_out}
        return split(best.shares, made, best.lean), record

    def _settled(self, search: Found, made: Mapping[Group, Curve]) -> tuple[Candidate, dict[str, Any]]:
        """The closed form, unless a candidate is better beyond noise on the calls that the search did not see.

        Held against it are the best of all and the best of its own rounds, which fits the search's calls less.
        """
        base, best = search.rounds[0], search.candidates[0]
        by_slopes = min(search.rounds, key=lambda one: one.loss)
        able = [one for one in ([best] if best is by_slopes else [best, by_slopes]) if one.loss < base.loss]
        _, rest = parted(self.study.data, self.step.calls)
        found: dict[str, Any] = {"calls": len(rest), "kept": "sensitivity"}
        if len(rest) < 2 or not able:
            return base, found
        judge = Judge(self.program, criterion(Loss.AUTO, self.program), rest)
        on_rest = lambda one: judge.each(self.masks(self._resolved(split(one.shares, made, one.lean))))
        losses = [on_rest(one) for one in steps([base, *able], "comparing the best on other data")]
        gains = [gain(one, losses[0], len(able)) for one in losses[1:]]
        means = [sum(one) / len(one) for one in losses]
        better = [i for i, one in enumerate(gains) if one.is_one]
        chosen = min(better or range(len(able)), key=lambda i: means[i + 1])
        found |= {"sensitivity": means[0], "searched": means[chosen + 1]}
        found |= {"ratio": gains[chosen].ratio, "margin": gains[chosen].margin}
        if not better:
            return base, found
        return able[chosen], found | {"kept": "searched"}

    def _parameter(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self.study.data[0][self.program.sources[name].index].detach()
        return found


def _nothing(program: Program, reasons: list[str]) -> UserError:
    """The error where no product can be made sparse."""
    if any(node.target in EXPANSIONS for node in program.graph.nodes):
        reasons.insert(0, "weights are codes already, which lie along the inputs: put 'rsparse' before 'quantize'")
    details = reasons[:3] or ["the program has no product with a parameter"]
    return UserError("pass 'rsparse' found no product to make sparse", details)


def decide(step: RSparse, study: Study) -> dict[str, SitePlan]:
    """A threshold for each group, the branch's factors, and what was left dense, with the reason.

    Raises:
        UserError: no batch, no product, too little data for a threshold, or a budget that cannot be kept.
    """
    if not study.data:
        raise UserError(
            "thresholds are quantiles of activations, and there is no batch", remedy="calibration=[(ids,), …]"
        )
    decision = Decision(step, study)
    choices, record = decision.choose()
    return plans(decision, choices, record)


def plans(decision: Decision, choices: Choices, record: Mapping[str, Any]) -> dict[str, SitePlan]:
    """The choices as a plan. What a group shares is at its first product, whose site is the others' `leader`."""
    found = {name: SitePlan({"reason": reason}) for name, reason in decision.refused.items()}
    spent = sum(group.spent(choice.fraction, choice.rank) for group, choice in choices.items())
    total = sum(group.bytes for group in choices)
    for group, mask in decision.masks(choices).items():
        choice, sample = choices[group], decision.samples[group]
        kept = 1 - float(sample.dropped(choice.fraction).float().mean())
        costs = _costs(decision, group, choice)
        for number, (site, name) in enumerate(zip(group.sites, group.names, strict=True)):
            structure: dict[str, Any] = {"leader": group.name, "fraction": choice.fraction, "rank": choice.rank}
            tensors: dict[str, torch.Tensor] = {}
            if mask.down is not None:
                structure["probe"] = list(probe(site.weight.evaluate(decision._parameter)))
                tensors["up"] = mask.ups[number]
            if number == 0:
                tensors["threshold"] = mask.threshold.float()
                if mask.down is not None:
                    tensors["down"] = mask.down
                structure |= {"kept": kept, "channels": group.n, "columns": group.m, "rows": sample.seen, **costs}
                structure["kind"] = group.kind
                structure["rotated"] = any(_is_rotated(s) for s in group.sites)
            found[name] = SitePlan(structure, tensors)
    found[MODEL] = SitePlan({"read": spent / total, "dense_bytes": decision.dense, "bytes": total, **record})
    return found


def _costs(decision: Decision, group: Group, choice: Choice) -> dict[str, float]:
    """What the group costs to second order as chosen, and with all of its bytes spent on channels."""
    if decision._curves is None:
        return {}
    curve = decision._curves[group]
    share = group.spent(choice.fraction, choice.rank) / group.bytes
    nearest = min(curve.ranks, key=lambda r: abs(r - choice.rank))
    return {"cost": curve.at(choice.fraction, nearest), "cost_channels": curve.at(share, 0)}


def _is_rotated(site: Any) -> bool:
    """Whether a rotation is folded into the weight's input channels."""
    return any(type(e).__name__ in ("Hadamard", "Blocks") and e.dim in (1, -1) for e in site.weight.walk())
