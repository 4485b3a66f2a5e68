"""Checkpoints with fewer experts: transformers loads them, and the logits are those of the merged graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fuseline
from fuseline.compiler.errors import UserError
from fuseline.compiler.observe.numerics import error
from tests.helpers.mixtures import build, tokens

SLICED = ("method=reap", "method=hc,router=slice", "method=partial-preservation")
CASES = [(f, m) for f in ("Mixtral", "Qwen2Moe", "Olmoe", "GraniteMoe", "GptOss", "DeepseekV3") for m in SLICED]


@torch.no_grad()
@pytest.mark.one_in(18)
@pytest.mark.parametrize(("family", "options"), CASES)
def test_logits_after_reload(family: str, options: str, tmp_path: Path) -> None:
    import transformers

    model = build(family, dtype=torch.float32)
    pipeline = f"raise,merge-experts{{{options}}}"
    plan = fuseline.analyze(model, pipeline, [tokens(seed=s) for s in range(2)])
    done = fuseline.export(model, tmp_path / "out", pipeline, plan=plan, example=tokens())
    assert done.error is not None and done.error < 1e-5 and done.changed >= 3
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    program, _ = fuseline.Pipeline(pipeline).run(fuseline.capture(model, (tokens(),)), plan=plan)
    merged = program.run(program.examples)[0]
    assert error(again(tokens()).logits, merged) < 1e-5
    assert error(again(tokens()).logits, model(tokens()).logits) > 1e-3  # and not those of the whole model
    before, after = (sum(p.numel() for n, p in m.named_parameters() if "experts." in n and "shared" not in n)
                     for m in (model, again))  # fmt: skip
    assert after == before / 2


def refusal(tmp_path: Path, pipeline: str, **options: object) -> str:
    model = build("Mixtral", dtype=torch.float32)
    needs = fuseline.Pipeline(pipeline).needs_data
    plan = fuseline.analyze(model, pipeline, [tokens()]) if needs else None
    with pytest.raises(UserError) as caught:
        fuseline.export(model, tmp_path / "out", pipeline, plan=plan, example=tokens(), **options)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


REFUSED = {
    "all experts": ("saliency=magnitude", "", "keeps all experts, in a form that no class of transformers reads"),
    "a router": ("method=hc", "", "router=slice"),
    "codes": ("method=reap", ",quantize{weights=int8}", "by merge-experts alone, without quantize"),
    "compressed-tensors": ("method=reap", "", "has no codes"),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", REFUSED)
def test_what_no_checkpoint_holds(case: str, tmp_path: Path) -> None:
    options, more, reason = REFUSED[case]
    format = {"format": case} if case == "compressed-tensors" else {}
    told = refusal(tmp_path, f"raise,merge-experts{{{options}}}{more}", **format)
    assert reason in told
    assert case != "all experts" or "fuseline.save" in told
