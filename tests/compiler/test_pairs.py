"""Pairs of experts in 16-bit words: every bfloat16 number becomes what the stated rule says, and no other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fuseline.compiler.errors import UserError
from fuseline.compiler.expert_expressions import PairedCodes, PairsInWords
from fuseline.compiler.expressions import Expression, Output, Param
from fuseline.compiler.formats.pair_codes import PAIR_CODES
from fuseline.compiler.formats.pairs import in_window, pack_pair, unpack_experts, unpack_slot
from fuseline.compiler.formats.words import Words
from fuseline.compiler.ops import decode_pair_words, decode_pairs

ALL = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
FITS = ALL[ALL.abs() < 2.0**17]  # NaN compares as false
STATES = [(m, s) for m in ((0, 0), (0, 1), (1, 0), (1, 1)) for s in ((0, 0), (0, 1), (1, 0), (1, 1))]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def rule(magnitude: torch.Tensor, mask: int, sign: int) -> torch.Tensor:
    """The rule in float64, on the numbers and not on their bits."""
    m = magnitude.double() * mask
    m = torch.where((m > 0) & (m < 2.0**-15), torch.where(m >= 2.0**-16, 2.0**-15, 0.0), m)
    return torch.where(m == 0, m, m * (1 - 2 * sign)).bfloat16()


@pytest.mark.parametrize(("masks", "signs"), STATES)
def test_every_bit_pattern_decodes_to_the_rule(masks: tuple[int, int], signs: tuple[int, int]) -> None:
    magnitude = FITS.abs()
    flags = [torch.tensor(f, dtype=torch.bool)[:, None].expand(2, len(FITS)) for f in (masks, signs)]
    words = pack_pair(magnitude, *flags)
    assert words.dtype == torch.int16
    for slot in (0, 1):
        back = unpack_slot(words, slot)
        assert same_bits(back, rule(magnitude, masks[slot], signs[slot]))
        kept = magnitude.double() * masks[slot] * (1 - 2 * signs[slot])
        assert float((back.double() - kept).abs().max()) <= 2.0**-16
        assert torch.equal(back.double()[magnitude >= 2.0**-15], kept[magnitude >= 2.0**-15])


def test_numbers_above_the_window_are_refused_and_say_what_to_do() -> None:
    for value in (2.0**17, float("inf"), float("nan")):
        with pytest.raises(UserError, match="fits no packed pair") as caught:
            pack_pair(torch.tensor([1.0, value]).bfloat16(), *torch.ones(2, 2, 2, dtype=torch.bool))
        assert "pack=none" in str(caught.value)
    assert len(FITS) == 2 * (127 + 17) * 128 and in_window(FITS.abs()).max() == 2.0**17 - 2.0**9


def test_one_alone_keeps_every_bit_pattern() -> None:
    assert same_bits(unpack_slot(ALL.view(torch.int16), 2), ALL)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(0, 3), st.integers(1, 9))
def test_experts_come_back_from_their_rows(seed: int, pairs: int, alone: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(0, len(FITS), (pairs, 3, n), generator=generator)
    flags = torch.rand(2, 2, pairs, 3, n, generator=generator) > 0.3
    words = pack_pair(FITS[picked].abs(), *flags)
    single = ALL[torch.randint(0, len(ALL), (alone, 3, n), generator=generator)]
    words = torch.cat((words, single.view(torch.int16)))
    order = torch.randperm(2 * pairs + alone, generator=generator)
    rows = torch.cat((torch.arange(pairs).repeat_interleave(2), pairs + torch.arange(alone)))[order].int()
    slots = torch.cat((torch.tensor([0, 1]).repeat(pairs), torch.full((alone,), 2)))[order].int()
    found = unpack_experts(words, rows, slots)
    for e, (row, slot) in enumerate(zip(rows.tolist(), slots.tolist(), strict=True)):
        assert same_bits(found[e], unpack_slot(words[row], slot))


@pytest.mark.parametrize("name", PAIR_CODES)
@pytest.mark.parametrize(("masks", "signs"), STATES)
def test_every_magnitude_of_few_bits_comes_back(name: str, masks: tuple[int, int], signs: tuple[int, int]) -> None:
    form = PAIR_CODES[name]
    codes = torch.arange(127 if name == "fp8" else 8, dtype=torch.uint8)  # 127 of E4M3 is no number
    flags = [torch.tensor(f, dtype=torch.bool)[:, None].expand(2, len(codes)) for f in (masks, signs)]
    packed = form.pack(codes, *flags)
    assert packed.shape == (form.row(len(codes)),)
    back, found = form.unpack(packed, len(codes))
    for slot in (0, 1):
        expected = form.values(codes) * masks[slot] * (1 - 2 * signs[slot])
        assert torch.equal(form.values(back) * found[slot], expected)


@pytest.mark.parametrize(("name", "group", "pairs"), [("fp8", 32, 2), ("int4", 16, 1), ("int4", 0, 1), ("fp8", 0, 2)])
def test_words_hold_what_the_packed_pairs_do(name: str, group: int, pairs: int) -> None:
    """As kernels read them: the same experts, and the packed codes come back, so that nothing keeps both."""
    x = torch.randn(5, 3, 96, generator=torch.Generator().manual_seed(pairs))
    own = tuple((2 * i, 2 * i + 1) for i in range(pairs)) + tuple((e,) for e in range(2 * pairs, 5))
    made = PairedCodes(Param("x"), own, 0.4, name, group)
    form, n = PAIR_CODES[name], 96
    words = Words.fitting(sum(form.planes), n, group or n)
    assert words is not None
    laid = PairsInWords(Output(made, "codes"), name, len(own), 3, n, words.run)
    value, codes, scale = (e.evaluate({"x": x}.get) for e in (laid, Output(made, "codes"), Output(made, "scale")))
    assert torch.equal(laid.restored(value), codes) and Expression.from_json(laid.to_json()) == laid
    rows = torch.tensor([row for row, members in enumerate(own) for _ in members], dtype=torch.int32)
    slots = torch.tensor([slot for members in own for slot in range(len(members))], dtype=torch.int32)
    across = scale.transpose(1, 2).contiguous()
    found = decode_pair_words(value, across, rows, slots, name, group or n, words.run, torch.float32)
    assert torch.equal(found, decode_pairs(codes, scale, rows, slots, name, n, torch.float32))
    assert found.abs().max() > 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from(sorted(PAIR_CODES)))
def test_codes_are_the_nearest_and_take_their_bits(seed: int, n: int, name: str) -> None:
    generator, form = torch.Generator().manual_seed(seed), PAIR_CODES[name]
    magnitude = torch.rand(3, n, generator=generator) * form.top
    masks = torch.rand(2, 3, n, generator=generator) > 0.3
    signs = torch.rand(2, 3, n, generator=generator) > 0.5
    packed = form.pack(form.magnitudes(magnitude), masks, signs)
    assert packed.shape == (3, sum(-(-n * width // 8) for width in form.planes)) and sum(form.planes) == form.bits + 3
    codes, found = form.unpack(packed, n)
    has = masks.any(0)
    off = (form.values(codes) - magnitude).abs()[has]
    bound = 0.5 if name == "int4" else (magnitude[has] / 16).clamp_min(2.0**-10)
    assert bool((off <= bound).all())
    assert torch.equal(found != 0, masks & (codes > 0))
    assert torch.equal(found[masks & (codes > 0)] < 0, signs[masks & (codes > 0)])
