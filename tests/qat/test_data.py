"""Text that a model makes itself, and the loss of a student."""

from __future__ import annotations

import pytest
import torch

from fuseline import UserError
from fuseline.models.decoder import TinyDecoder
from fuseline.qat import distillation_loss, generate


class Counting(torch.nn.Module):
    """The next id is the last one plus one, with certainty, but where `loose`: then any, equally."""

    def __init__(self, loose: bool):
        super().__init__()
        self.loose, self.unused = loose, torch.nn.Parameter(torch.zeros(1))
        self.lengths: list[int] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.lengths.append(ids.shape[1])
        certain = torch.nn.functional.one_hot((ids + 1) % 12, 12).float()
        return certain * (1e-3 if self.loose else 100.0)


def test_the_first_tokens_are_greedy_and_the_others_drawn() -> None:
    made = generate(Counting(loose=True), 24, 40, greedy=(3, 5), batch=12)
    assert made.shape == (24, 40) and made.dtype == torch.int64
    start = torch.arange(24) % 12
    assert torch.equal(made[:, 0], start)
    assert torch.equal(made[:12, 1:3], (start[:12, None] + torch.tensor([1, 2])) % 12)
    assert torch.equal(made[12:, 1:5], (start[12:, None] + torch.tensor([1, 2, 3, 4])) % 12)
    follows = (made[:, 6:] == (made[:, 5:-1] + 1) % 12).float().mean()
    assert 0.03 < follows < 0.15  # one in twelve
    assert torch.equal(generate(Counting(loose=False), 3, 9), (torch.arange(3)[:, None] + torch.arange(9)) % 12)


def test_seeds_and_first_tokens() -> None:
    model = TinyDecoder(32, 16, 1, 2, 1).train()
    one, same, other = (generate(model, 4, 12, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and model.training
    given = generate(model, 2, 6, first=torch.tensor([7, 9]))
    assert given[:, 0].tolist() == [7, 9]


def test_a_cache_changes_nothing() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(ids, use_cache=False).logits

    assert torch.equal(generate(model, 5, 14), generate(Whole(), 5, 14))


def test_what_cannot_be_generated() -> None:
    with pytest.raises(UserError, match="not 0 of 4"):
        generate(Counting(loose=False), 0, 4)


def test_distillation_loss() -> None:
    student = torch.randn(2, 3, 7, requires_grad=True)
    teacher = torch.randn(2, 3, 7, requires_grad=True)
    p = teacher.softmax(-1)
    expected = (p * (p.log() - student.log_softmax(-1))).sum(-1).mean()
    loss = distillation_loss(student, teacher)
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert distillation_loss(teacher, teacher) < 1e-6
    softer = distillation_loss(student.bfloat16(), teacher.bfloat16(), temperature=2.0)
    assert softer.dtype == torch.float32 and softer > 0
