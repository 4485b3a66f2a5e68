"""Ops that only move elements, inside fused regions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.codegen.regions import check

MOVES = {
    "view": lambda x: x.view(2, 24, 10) * 2,
    "view_merging": lambda x: x.reshape(16, 30) + 1,
    "view_across_groups": lambda x: x.reshape(32, 15) + 1,
    "flatten": lambda x: x.flatten(1, 2).exp(),
    "unflatten": lambda x: x.unflatten(1, (2, 3)).exp(),
    "unsqueeze_squeeze": lambda x: x.unsqueeze(1).exp().squeeze(1) + x,
    "transpose": lambda x: x.transpose(0, 2) * 2,
    "permute": lambda x: x.permute(2, 0, 3, 1) * 2,
    "movedim": lambda x: x.movedim(3, 0) * 2,
    "slice": lambda x: x[:, 1:5, ::2] + x[:, :4, 1:5],
    "narrow": lambda x: x.narrow(3, 1, 3) * 2,
    "negative_slice": lambda x: x[..., -3:] * 2,
    "slice_beyond": lambda x: x[..., 2:100] * 2,
    "select": lambda x: x[:, 3] * x[:, -1],
    "select_first_of_unbind": lambda x: x.unbind(1)[2] + x.unbind(1)[0],
    "chunk": lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1],
    "split": lambda x: x.split([1, 4], -1)[1] * 2,
    "split_sizes": lambda x: x.split(2, -1)[1] * 2,
    "cat": lambda x: torch.cat((x, 2 * x, -x[:, :2]), 1),
    "cat_last": lambda x: torch.cat((x[..., 3:], x[..., :3]), -1) * 2,
    "stack": lambda x: torch.stack((x, -x), -1).flatten(-2),
    "stack_first": lambda x: torch.stack((x, x * 3), 0),
    "repeat_heads": lambda x: x.repeat_interleave(3, 1) * 2,
    "expand_heads": lambda x: (x[:, :, None] * 2).expand(2, 6, 3, 8, 5).reshape(2, 18, 8, 5),
    "expand": lambda x: x[:1].expand(7, 6, 8, 5) + 1,
    "clone": lambda x: x.transpose(1, 2).contiguous().view(2, 8, 30).clone() + 1,
    "view_of_a_transpose": lambda x: (x.transpose(1, 2) * 2).reshape(2, 8, 30) + 1,
    "only_a_view": lambda x: x.transpose(1, 2),
}


@pytest.mark.parametrize("name", MOVES)
def test_move(name: str, tmp_path: Path) -> None:
    others = [(torch.randn(8, 6, 2, 5).permute(2, 1, 0, 3),)]
    function = MOVES[name]
    launcher = check(lambda x: function(x), torch.randn(2, 6, 8, 5), folder=tmp_path)
    if "view" not in name and "flatten" not in name:  # a view of a permuted tensor is not the same program
        check(lambda x: function(x), *others[0], folder=tmp_path)
    assert len(launcher.kernels) == 1


def test_moves_of_rows(tmp_path: Path) -> None:
    """Reductions beside views: the kernel runs over the rows that are reduced."""
    x = torch.randn(2, 6, 40)
    check(lambda x: torch.softmax(x.view(2, 6, 4, 10), -1).view(2, 6, 40), x, folder=tmp_path)
    check(lambda x: torch.softmax(x.view(2, 6, 4, 10), -1).transpose(1, 2), x, folder=tmp_path)
    check(lambda x: x.softmax(-1)[1:], x, folder=tmp_path)
    check(lambda x: torch.cat((x, x[..., :8]), -1).softmax(-1), x, folder=tmp_path)
    check(lambda x: x.transpose(0, 1).softmax(-1) * 2, x, folder=tmp_path)


def test_symbolic_moves(tmp_path: Path) -> None:
    def split_heads(x: torch.Tensor) -> torch.Tensor:
        return (x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2) * 2).reshape(x.shape[0], 4, -1)

    def joined(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat((x * 2, y), 1) + 1

    def halves(x: torch.Tensor) -> torch.Tensor:
        return x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]

    run = [(torch.randn(1, 1, 32),), (torch.randn(3, 17, 32),)]
    check(split_heads, torch.randn(2, 5, 32), dynamic={0: (0, 1)}, run=run, folder=tmp_path)
    run2 = [(torch.randn(2, 1, 6), torch.randn(2, 9, 6)), (torch.randn(2, 40, 6), torch.randn(2, 2, 6))]
    inputs = torch.randn(2, 3, 6), torch.randn(2, 4, 6)
    check(joined, *inputs, dynamic={0: (1,), 1: (1,)}, run=run2, folder=tmp_path)
    check(halves, torch.randn(3, 10), dynamic={0: (0,)}, run=[(torch.randn(7, 10),)], folder=tmp_path)


def test_strides_of_results_follow_the_graph(tmp_path: Path) -> None:
    x = torch.randn(4, 5, 6)
    launcher = check(lambda x: (x.transpose(0, 2) * 2, x + 1, x[:, :1].expand(4, 5, 6)), x, folder=tmp_path)
    assert "torch.empty_strided((6, 5, 4), (1, 6, 30)" in launcher.source
