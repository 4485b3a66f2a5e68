"""Plan: what a pass that needs data decided, site by site, so that every graph captured after is rewritten alike.

    {version, pipeline, model: {parameter: "dtype[sizes]"}, passes: {pass: identity},
     sites: {site: {pass: {structure: …, tensors: {name: key}}}}}

as JSON, with the tensors in a safetensors file beside it. *Structure* (bits, rank, pairing) is JSON and selects how a
site is rewritten; *tensors* (thresholds, scales) are its values.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import UserError
from .framework import Pass
from .identity import identity
from .planned import keep
from .program import Program
from .structure import describe_value

if TYPE_CHECKING:
    from .pipeline import Pipeline

VERSION = 1
AGAIN = "fuseline.analyze(model, pipeline, calibration=batches), or the command fuseline analyze"


@dataclass
class SitePlan:
    """One pass's decision at one site."""

    structure: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Plan:
    """The decisions of a pipeline's passes for one model.

    pipeline: the text of the pipeline that was analysed; model: its parameters and their types;
    sites: site → pass → decision; passes: the identity of each pass that decided (`identity.py`).
    """

    pipeline: str
    model: dict[str, str] = field(default_factory=dict)
    sites: dict[str, dict[str, SitePlan]] = field(default_factory=dict)
    passes: dict[str, str | None] = field(default_factory=dict)

    @staticmethod
    def empty(pipeline: str, program: Program) -> Plan:
        """A plan without decisions for the model that `program` was captured from."""
        own = (
            source for source in program.sources.values() if not source.constant
        )  # other captures name them otherwise
        return Plan(pipeline, {source.name: describe_value(source.tensor) for source in own})

    def add(self, step: Pass, decisions: Mapping[str, SitePlan]) -> None:
        """Records the decisions of a pass."""
        self.passes[step.name] = identity(step)
        for site, decision in decisions.items():
            self.sites.setdefault(site, {})[step.name] = decision

    def of(self, step: str) -> dict[str, SitePlan]:
        """The decisions of the pass called `step`, by site."""
        return {site: passes[step] for site, passes in self.sites.items() if step in passes}

    def check(self, pipeline: Pipeline, program: Program) -> None:
        """Refuses another pipeline or another model than the plan was made for; warns where a pass's code has changed.

        Raises:
            UserError: naming the pipelines, or the first parameter that differs.
        """
        self.check_pipeline(pipeline)
        for step in pipeline.passes:
            then, now = self.passes.get(step.name), identity(step)
            if then is not None and now is not None and then != now:
                warnings.warn(
                    f"the plan's decisions for '{step.name}' were made by other code ({then}, now {now}); "
                    f"if it decides otherwise, analyse again: {AGAIN}",
                    stacklevel=4,
                )
        for source in program.sources.values():
            if source.constant:
                continue
            here, there = describe_value(source.tensor), self.model.get(source.name)
            if here != there:
                name = source.name
                raise UserError(
                    f"the plan was made for another model: '{name}' is {here} here and {there or 'absent'} there",
                    remedy=f"analyse this model: {AGAIN}",
                )

    def check_pipeline(self, pipeline: Pipeline) -> None:
        """The part of `check` that needs no model."""
        if str(pipeline) != self.pipeline:
            raise UserError(
                "the plan was made for another pipeline",
                [f"plan: {self.pipeline}", f"here: {pipeline}"],
                f"use the plan's pipeline, or analyse again: {AGAIN}",
            )

    def save(self, path: str | Path) -> Path:
        """Writes `path` (a .json file) and the tensors beside it; returns the path."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        sites: dict[str, Any] = {}
        for site, passes in self.sites.items():
            for step, decision in passes.items():
                keys = {name: f"{site}:{step}:{name}" for name in decision.tensors}
                tensors.update({keys[n]: t.detach().contiguous() for n, t in decision.tensors.items()})
                sites.setdefault(site, {})[step] = {"structure": decision.structure, "tensors": keys}
        save_file(tensors, path.with_suffix(".safetensors"))
        record: dict[str, Any] = {
            "version": VERSION,
            "pipeline": self.pipeline,
            "model": self.model,
            "passes": self.passes,
        }
        record["sites"] = sites
        path.write_text(json.dumps(record, indent=1))
        return path

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Reads a plan back.

        Raises:
            UserError: a missing, truncated or foreign file, or a version that this release does not read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        try:
            record = json.loads(path.read_text())
            tensors = load_file(path.with_suffix(".safetensors"))
        except FileNotFoundError as error:
            raise UserError(f"no plan at {path}: {error.filename or path} is missing") from None
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise UserError(f"{path} is not a complete plan: {error}") from None
        if not isinstance(record, dict) or record.get("version") != VERSION:
            found = record.get("version") if isinstance(record, dict) else None
            raise UserError(f"{path} is a plan of version {found}, and this release reads version {VERSION}")
        try:
            sites = {
                site: {
                    step: SitePlan(d["structure"], {name: tensors[key] for name, key in d["tensors"].items()})
                    for step, d in passes.items()
                }
                for site, passes in record["sites"].items()
            }
            pipeline, model, made_by = str(record["pipeline"]), dict(record["model"]), dict(record.get("passes", {}))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is a damaged plan: {reason}", remedy=f"analyse again: {AGAIN}") from None
        for tensor in tensors.values():
            keep(tensor)  # for weight expressions in files of graphs, which name them
        return Plan(pipeline, model, sites, made_by)
