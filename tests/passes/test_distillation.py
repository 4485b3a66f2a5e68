"""`method=lkd`: where a program is cut, and weights trained part by part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fuseline
from fuseline import Pipeline, UserError
from fuseline.compiler.plan import Plan
from fuseline.compiler.schemes import Scheme
from fuseline.passes.calibrated import distil
from fuseline.passes.calibrated.segments import segments
from fuseline.passes.quantize_sites import sites
from tests.helpers.models import Mlp, Tied, error
from tests.passes.rotated_models import VOCABULARY, Decoder, Shape

LKD = "quantize{weights=int3:g8:sym,method=lkd}"


class Stack(nn.Module):
    """Gated MLPs, one behind the other: each ends where only the stream goes on."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(Mlp(8, 16) for _ in range(layers)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def batches(count: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=draw)
    return [(torch.randn(40, 8, generator=draw) @ mixing).to(dtype) for _ in range(count)]


@torch.no_grad()
def lost(model: nn.Module, pipeline: str, data: list[torch.Tensor]) -> float:
    plan = fuseline.analyze(model, pipeline, data) if Pipeline(pipeline).needs_data else None
    run = Pipeline(pipeline).run(fuseline.capture(model, (data[0],)), plan=plan, verification="full")[0].to_module()
    return sum(float((run(x) - model(x)).square().sum()) for x in data)


def test_a_model_is_cut_where_one_value_crosses() -> None:
    model = Stack(3)
    program = fuseline.capture(model, (batches()[0],))
    found, refused = segments(program, list(sites(program)))
    assert not refused and [len(part.sites) for part in found] == [3, 3, 3]
    assert all("add" in part.result.name for part in found)
    covered = [node for part in found for node in part.nodes]
    assert len(covered) == len(set(covered))
    decoder = Decoder(Shape(width=16, heads=2, head=8, inner=32, layers=2))
    program = fuseline.capture(decoder, (torch.randint(0, VOCABULARY, (2, 12)),))
    found, refused = segments(program, list(sites(program)))
    by_part = [sorted(site.path.rpartition(".")[2] for site in part.sites) for part in found]
    assert len(by_part) >= 4 and ["down", "gate", "up"] in by_part
    assert all("no single value crosses" in reason for reason in refused.values())


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "options",
    [
        "weights=int3:g8:sym",
        "weights=int2:g8",
        "weights=int3:g8:sym,activations=int8",
        "weights=fp4:g8,activations=fp8:static",
    ],
)
def test_it_loses_less_than_rounding_to_nearest(options: str) -> None:
    model, data = Stack(), batches()
    text = f"quantize{{{options},method=lkd,rounds=40}}"
    plan = fuseline.analyze(model, text, data)
    for passes in plan.sites.values():
        structure = passes["quantize"].structure
        assert structure["error"] <= structure["error_nearest"]
    assert lost(model, text, data) < 0.85 * lost(model, text.replace("lkd,rounds=40", "rtn"), data)
    held = torch.cat([parameter.flatten() for parameter in model.parameters()])
    assert torch.equal(held, torch.cat([parameter.flatten() for parameter in Stack().parameters()]))


def test_the_second_part_reads_what_the_first_leaves() -> None:
    model, data = Stack(), batches()
    text = LKD.replace("int3", "int2")
    plan = fuseline.analyze(model, text, data)
    codes = {site: passes["quantize"].tensors["codes"] for site, passes in plan.sites.items()}
    alone = fuseline.analyze(model, text.replace("}", ",skip=layers.0.*}"), data)
    differs = [
        not torch.equal(codes[site], passes["quantize"].tensors["codes"]) for site, passes in alone.sites.items()
    ]
    assert len(differs) == 3 and any(differs)


@pytest.mark.slow
def test_float64_and_more_rounds() -> None:
    model, data = Stack().double(), batches(dtype=torch.float64)
    few, many = (lost(model, LKD.replace("}", f",rounds={count}}}"), data) for count in (1, 20))
    assert many < few < 1.2 * lost(model, LKD.replace("lkd", "rtn"), data)


@torch.no_grad()
def test_a_plan_is_kept(tmp_path: Path) -> None:
    model, data = Stack(), batches()
    plan = fuseline.analyze(model, LKD, data)
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    first = plan.sites["layers.0.down/linear#0"]["quantize"]
    assert first.structure["scheme"] == "int3:g8:sym" and first.structure["method"] == "lkd"
    one, other = (fuseline.optimize(Stack(), LKD, plan=p)(data[0]) for p in (plan, loaded))
    assert torch.equal(one, other) and error(one, model(data[0])) < 0.5
    assert Pipeline(LKD).passes[0].findings(plan.of("quantize")).headings[2] == "error"


@pytest.mark.slow
def test_a_stopped_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, file = Stack(), batches(), tmp_path / "progress.safetensors"
    whole = fuseline.analyze(model, LKD, data)
    real, seen = distil._decisions, []

    def stops(step, segment, *rest):
        if len(seen) == 1:
            seen.append("stopped")
            raise KeyboardInterrupt
        seen.append(segment.result.name)
        return real(step, segment, *rest)

    monkeypatch.setattr(distil, "_decisions", stops)
    with pytest.raises(KeyboardInterrupt):
        fuseline.analyze(model, LKD, data, checkpoint=file)
    resumed = fuseline.analyze(model, LKD, data, checkpoint=file)
    assert len(seen) == 3 and not file.exists()
    for site, passes in whole.sites.items():
        for name, tensor in passes["quantize"].tensors.items():
            assert torch.equal(resumed.sites[site]["quantize"].tensors[name], tensor)


class Caches(nn.Module):
    """Writes what a product makes into memory that the caller holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("held", torch.zeros(40, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.held.copy_(self.first(x))
        return self.second(self.held) + x


def test_what_is_left_and_why() -> None:
    model, data = Caches(), batches()
    program = fuseline.capture(model, (data[0],))
    found, refused = segments(program, list(sites(program)))
    assert not found and len(refused) == 2
    assert any("writes in place" in reason for reason in refused.values())
    tied = Tied()
    ids = [torch.randint(0, 12, (3, 5))]
    text = "quantize{weights=int4:g8,method=lkd,only=body}"
    assert "reason" not in fuseline.analyze(tied, text, ids).sites["body/linear#0"]["quantize"].structure
    with pytest.raises(UserError, match="has one more for the tensor"):
        Pipeline("quantize{weights=nvfp4,method=lkd}")
    with pytest.raises(UserError, match="'rounds' says nothing to method=rtn"):
        Pipeline("quantize{weights=int4,rounds=3}")
    with pytest.raises(UserError, match="chooses the codes of weights"):
        Pipeline("quantize{activations=int8,method=lkd}")


def test_the_best_weights_are_on_the_grid_of_their_own() -> None:
    trained = distil.Trained.of(None, Scheme.parse("int4:g8:sym:mse", weights=True), torch.randn(4, 16))
    (trained.rounded() ** 2).sum().backward()
    assert torch.equal(trained.weight.grad, 2 * trained.rounded().detach())
    assert torch.equal(trained.rounded().detach(), trained.scheme.rounded(trained.original, trained.part))
