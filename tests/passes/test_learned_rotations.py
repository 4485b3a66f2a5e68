"""`rotate{kind=learned}` and `rotate{choose}`: decided on calibration batches, exact whatever was decided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fuseline
from fuseline.compiler.errors import PassError, UserError
from fuseline.compiler.expressions import Planned
from fuseline.compiler.plan import Plan, SitePlan
from fuseline.compiler.rewriter import Rewriter
from fuseline.passes import Rotate
from fuseline.passes.rotation.learning import matrices
from fuseline.passes.rotation.learning.cayley import Cayley, nearest_orthogonal
from fuseline.passes.rotation.rotations import Kind
from tests.passes.rotated_models import VOCABULARY, Decoder, Shape

QUANTIZE = "quantize{weights=int4:sym,activations=int4:token}"
LEARN = f"raise,rotate{{r1,r2,r4,kind=learned,steps=12}},{QUANTIZE}"
CHOOSE = f"raise,rotate{{r1,r2,r3,r4,choose}},{QUANTIZE}"


def decoder(**choices) -> Decoder:
    """Its blocks weigh as much as its embedding, and one hidden channel of each MLP is 30 times the others."""
    model = Decoder(Shape(width=16, heads=2, head=8, inner=32, layers=2, **choices))
    with torch.no_grad():
        model.embed.weight.mul_(0.1)
        for mlp in model.mlps:
            mlp.up.weight[3] *= 30
            mlp.down.weight[:, 3] /= 30
    return model.float()


def batches(count: int = 4) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, VOCABULARY, (3, 12), generator=generator),) for _ in range(count)]


@pytest.fixture(scope="module")
def learned() -> tuple[Decoder, Plan]:
    model = decoder()
    return model, fuseline.analyze(model, LEARN, batches())


@torch.no_grad()
def divergence(model: nn.Module, pipeline: str, plan: Plan | None = None) -> float:
    """Mean over positions of KL(as it was ‖ after the pipeline)."""
    after, _ = fuseline.Pipeline(pipeline).run(fuseline.capture(model, batches()[0]), plan=plan)
    changed, total = after.to_module(), 0.0
    for (ids,) in batches():
        p, q = (F.log_softmax(run(ids).double(), -1).flatten(0, -2) for run in (model, changed))
        total += F.kl_div(q, p, reduction="batchmean", log_target=True).item()
    return total / len(batches())


def test_what_was_learned_costs_less_and_is_what_was_measured(learned: tuple[Decoder, Plan]) -> None:
    model, plan = learned
    measured = plan.sites[""]["rotate"].structure["measured"]
    assert measured["learned"] < 0.95 * measured["start"]
    assert divergence(model, LEARN, plan) == pytest.approx(measured["learned"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("schemes", ["weights=fp4:g16,activations=nvfp4", "weights=ternary,activations=fp4"])
def test_what_was_measured_holds_for_other_formats(schemes: str) -> None:
    text = f"raise,rotate{{r1,r2,kind=learned,steps=5,rate=0.03}},quantize{{{schemes}}}"
    model = decoder()
    plan = fuseline.analyze(model, text, batches())
    measured = plan.sites[""]["rotate"].structure["measured"]
    assert measured["learned"] < measured["start"]
    assert divergence(model, text, plan) == pytest.approx(measured["learned"], rel=0.02)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["orthogonal", "learned,steps=1"])
def test_a_rotation_at_run_time_is_not_quantized(kind: str) -> None:
    """Behind a tied embedding R1 is a product of its own, and so is R3 when it is no Hadamard transform."""
    model, after = decoder(tied=True), QUANTIZE
    expected = fuseline.Pipeline(f"raise,{after}").run(fuseline.capture(model, batches()[0]))[1]["quantize"]
    text = f"raise,rotate{{r1,r2,r3,r4,kind={kind}}},{after}"
    passes = fuseline.Pipeline(text)
    plan = fuseline.analyze(model, passes, batches()) if passes.needs_data else None
    _, report = passes.run(fuseline.capture(model, batches()[0]), plan=plan)
    assert report["rotate"].matched and report["quantize"].matched == expected.matched


def test_each_layer_has_its_own_r2(learned: tuple[Decoder, Plan]) -> None:
    found = [tensors for p in learned[1].sites.values() for tensors in [p["rotate"].tensors] if "R2" in tensors]
    assert len(found) == 2 and not torch.allclose(found[0]["R2"], found[1]["R2"], atol=1e-2)


def test_the_rotation_is_exact(learned: tuple[Decoder, Plan]) -> None:
    model, plan = learned
    model = decoder().double()  # the same weights
    with torch.no_grad():
        program = fuseline.capture(model, batches()[0])
        before = program.run(program.examples)[0]
        program, _ = fuseline.Pipeline("raise").run(program)
        rewriter = Rewriter(program, "rotate")
        rewriter.decisions = plan.of("rotate")
        fuseline.Pipeline(LEARN).passes[1].run(program, rewriter)
        after = program.run(program.examples)[0]
    assert any(isinstance(e, Planned) for n in program.weights() for e in n.meta["weight"].walk())
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()


@pytest.mark.slow
def test_a_plan_that_was_saved_decides_the_same(learned: tuple[Decoder, Plan], tmp_path: Path) -> None:
    model, plan = learned
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    assert divergence(model, LEARN, loaded) == divergence(model, LEARN, plan)
    optimized = fuseline.optimize(decoder(), LEARN, plan=loaded)
    after, _ = fuseline.Pipeline(LEARN).run(fuseline.capture(model, batches()[0]), plan=plan)
    with torch.no_grad():
        assert torch.allclose(optimized(*batches()[0]), after.to_module()(*batches()[0]), atol=1e-5)


def test_a_saved_model_keeps_its_learned_rotations(learned: tuple[Decoder, Plan], tmp_path: Path) -> None:
    _, plan = learned
    model = fuseline.optimize(decoder(), LEARN, plan=plan)
    with torch.no_grad():
        expected = model(*batches()[0])
        fuseline.save(model, tmp_path / "saved")
        again = fuseline.load(tmp_path / "saved", model=decoder())
        assert torch.allclose(again(*batches()[0]), expected, atol=1e-5)


def test_a_stopped_search_goes_on_where_it_was(monkeypatch, tmp_path: Path) -> None:
    text, model, file = LEARN.replace("steps=12", "steps=8"), decoder(), tmp_path / "progress.safetensors"
    whole = fuseline.analyze(model, text, batches())
    taken = []

    def stops(work, *args, **kwargs):
        for number in work:
            if not taken and number == 6:
                taken.append(number)
                raise KeyboardInterrupt
            yield number

    monkeypatch.setattr(matrices, "steps", stops)
    with pytest.raises(KeyboardInterrupt):
        fuseline.analyze(model, text, batches(), checkpoint=file)
    assert file.exists()
    with pytest.raises(UserError, match="another search"):
        fuseline.analyze(model, LEARN, batches(), checkpoint=file)
    resumed = fuseline.analyze(model, text, batches(), checkpoint=file)
    assert not file.exists()
    for site, decision in whole.of("rotate").items():
        for name, tensor in decision.tensors.items():
            assert torch.allclose(resumed.sites[site]["rotate"].tensors[name], tensor, atol=1e-4)


def test_rotations_that_pay_are_kept_and_the_others_named() -> None:
    model = decoder()
    plan = fuseline.analyze(model, CHOOSE, batches())
    decided = plan.sites[""]["rotate"].structure
    assert "r4" in decided["keep"] and "r3" not in decided["keep"]  # keys are not quantized
    assert decided["measured"]["+".join(decided["keep"])] == min(
        decided["measured"][k] for k in ("none", "r4", "+".join(decided["keep"]))
    )
    _, report = fuseline.Pipeline(CHOOSE).run(fuseline.capture(model, batches()[0]), plan=plan)
    reasons = " ".join(report["rotate"].refused.values())
    assert "r3: it does not pay" in reasons and "R4 online" in report["rotate"].rules
    kept = f"raise,rotate{{{','.join(decided['keep'])}}},{QUANTIZE}"
    assert divergence(model, CHOOSE, plan) == pytest.approx(divergence(model, kept), rel=1e-5)


def test_findings_say_what_each_rotation_brought() -> None:
    step = Rotate(r1=True, r2=True, r4=True, kind=Kind.LEARNED, choose=True)
    measured = {"start": 4.0, "learned": 3.0, "none": 8.0, "r1": 9.0, "r2": 8.0, "r4": 4.0, "r1+r4": 3.0, "r2+r4": 4.0}
    measured["r1+r2+r4"] = 3.0
    decided = {"keep": ["r1", "r4"], "why": {"r2": "…"}, "loss": "divergence", "measured": measured}
    tensors = {"R1": torch.eye(2), "R2": torch.eye(2)}
    found = step.findings({"": SitePlan(decided), "a/linear#0": SitePlan(tensors=tensors)})
    assert found.headings == ("rotations", "divergence", "change", "found")
    assert found.rows == (
        ("r1+r2+r4 at the start", "4", "", ""),
        ("r1+r2+r4 learned", "3", "-25.0%", "kept"),
        ("none", "8", "", ""),
        ("r1", "9", "+12.5%", ""),
        ("r2", "8", "+0.0%", ""),
        ("r4", "4", "-50.0%", "kept"),
        ("r1+r4", "3", "-25.0%", "kept"),
        ("r2+r4", "4", "+0.0%", ""),
        ("r1+r2+r4", "3", "+0.0%", "does not pay"),
    )
    assert found.lines == ("learned R1 at 1 site", "learned R2 at 1 site", "kept: r1, r4")


@pytest.mark.slow
def test_other_losses() -> None:
    for loss in ("next-token", "error"):
        text = LEARN.replace("steps=12", f"steps=4,loss={loss}")
        measured = fuseline.analyze(decoder(), text, batches(2)).sites[""]["rotate"].structure
        assert measured["loss"] == loss and measured["measured"]["start"] > 0


def test_what_cannot_be_learned() -> None:
    model = decoder()
    with pytest.raises(UserError, match="none of them is lossy"):
        fuseline.analyze(model, "raise,rotate{r1,kind=learned}", batches())
    with pytest.raises(UserError, match="only r1 and r2 are learned"):
        fuseline.Pipeline("raise,rotate{r4,kind=learned}")
    with pytest.raises(UserError, match="needs calibration|calibration="):
        fuseline.optimize(model, LEARN)
    body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    with pytest.raises(UserError, match="returns none"):
        fuseline.analyze(
            body, f"raise{{allow_empty}},rotate{{r4,choose,loss=divergence}},{QUANTIZE}", [(torch.randn(4, 8),)]
        )


def test_nothing_that_pays_is_an_error_with_the_figures() -> None:
    """Weights of eight bits lose nothing by keeping their basis."""
    text = "raise,rotate{r3,choose},quantize{weights=int8}"
    model = decoder()
    with pytest.raises(PassError, match="does not pay"):
        plan = fuseline.analyze(model, text, batches(1))
        fuseline.Pipeline(text).run(fuseline.capture(model, batches()[0]), plan=plan)


def test_cayley_steps_stay_orthogonal_and_find_a_rotation() -> None:
    torch.manual_seed(0)
    target = nearest_orthogonal(torch.randn(12, 12)).float()
    target = target if torch.linalg.det(target) > 0 else target[[1, 0, *range(2, 12)]]
    x = torch.eye(12, requires_grad=True)
    optimizer = Cayley([x], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (x - target).square().sum().backward()
        optimizer.step()
    assert (x.detach() @ x.detach().T - torch.eye(12)).abs().max() < 1e-5
    assert (x.detach() - target).abs().max() < 0.1


def test_a_step_turns_as_far_as_the_rate_says_on_any_loss() -> None:
    for scale in (1e-6, 1.0, 1e6):
        x = torch.eye(32, requires_grad=True)
        optimizer = Cayley([x], 0.01)
        (x * torch.randn(32, 32)).sum().mul(scale).backward()
        optimizer.step()
        angle = torch.linalg.matrix_norm(x.detach() - torch.eye(32), 2)
        assert 0.01 < angle < 0.025
