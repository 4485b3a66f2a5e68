"""LoRA of the package peft on a rotated Llama: put on before or behind `optimize`, trained, merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fuseline
from fuseline.compiler.precision import error

pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="pip install --no-deps peft")
IDS = torch.arange(24).unsqueeze(0) * 7 % 512
ROTATE = "raise,rotate{r1,r4,kind=random-hadamard}"
EXACT = 1e-12


@pytest.fixture(scope="module")
def llama() -> Any:
    """In float64, its norms replaced by PyTorch's, which cast to nothing else."""
    from fuseline.models.spec import load

    model: Any = load("demo:tiny-llama").model.double()
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                plain = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
                plain.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
                setattr(parent, name, plain)
    return model


def config() -> Any:
    return peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def drawn(model: Any) -> Any:
    """The adapters' values, both matrices of them, and nothing else to train."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data.normal_(0, 0.1, generator=draw)
    return model


def before(model: Any) -> Any:
    return fuseline.optimize(drawn(peft.get_peft_model(model, config())), ROTATE)


def behind(model: Any) -> Any:
    optimized = called(fuseline.optimize(model, ROTATE))
    return drawn(peft.get_peft_model(optimized, config()))


def injected(model: Any) -> Any:
    optimized = called(fuseline.optimize(model, ROTATE))
    return drawn(peft.inject_adapter_in_model(config(), optimized))


def called(model: Any) -> Any:
    logits(model)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("adapt", [before, behind, injected])
def test_adapters_train_and_the_rotation_stays_exact(llama: Any, adapt: Any) -> None:
    torch.compiler.reset()
    eager, model = drawn(peft.get_peft_model(copy.deepcopy(llama), config())), adapt(copy.deepcopy(llama))
    base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    for one in (eager, model):
        one.optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        expected, found = gradients(eager), gradients(model)
        assert expected.keys() == found.keys() and len(found) == 8
        assert max(error(found[name], expected[name]) for name in expected) < EXACT
        eager.optimizer.step()
        model.optimizer.step()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert error(logits(model), logits(eager)) < EXACT
    report = compilations(model)[-1].report["rotate"]
    assert not report.refused and report.rules["R4 online"] == 2 and report.rules["R1 into columns"] > 10


def compilations(model: Any) -> list[Any]:
    """Of the model, or of the one that peft has wrapped."""
    try:
        return fuseline.reports(model)
    except fuseline.UserError:
        return fuseline.reports(model.base_model.model)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("adapt", [before, behind])
def test_merged_adapters_are_in_what_is_folded_next(llama: Any, adapt: Any) -> None:
    """peft merges by edits of `.data`, which no version tells of."""
    torch.compiler.reset()
    model = adapt(copy.deepcopy(llama))
    expected = logits(drawn(peft.get_peft_model(copy.deepcopy(llama), config())))
    assert error(logits(model), expected) < EXACT < 1e-3 < error(logits(llama), expected)
    merged = fuseline.optimize(model.merge_and_unload(), ROTATE)
    assert error(logits(merged), expected) < EXACT


@pytest.mark.slow
def test_adapters_merged_in_place_need_a_refresh(llama: Any) -> None:
    torch.compiler.reset()
    model = called(before(copy.deepcopy(llama)))
    expected = logits(model)
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        fuseline.refresh(model)
        assert error(logits(model), expected) < EXACT
