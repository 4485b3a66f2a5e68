"""The layout of codes in words: dense, invertible, and kept by weight expressions."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fuseline.compiler.expressions import Expression, InWords, Output, Pack, Param, Quantize, Transpose
from fuseline.compiler.formats.words import Words
from fuseline.compiler.ops import decode, decode_words
from fuseline.compiler.schemes import Scheme
from fuseline.compiler.weights import WeightStore


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*range(1, 9), 10]),
    st.integers(1, 70),
    st.sampled_from([1, 3, 64, 130]),
    st.sampled_from([0, 16, 32, 48, 128]),
    st.integers(0, 2**31),
)
def test_codes_come_back(bits: int, size: int, rows: int, group: int, seed: int) -> None:
    channels = size * (group or 1)
    words = Words.fitting(bits, channels, group or channels)
    assert words is not None
    codes = torch.randint(0, 2**bits, (rows, channels), generator=torch.Generator().manual_seed(seed))
    codes = codes.to(torch.int16 if bits > 8 else torch.uint8)
    packed = words.pack(codes)
    assert packed.dtype == torch.int32 and packed.shape == words.shape(rows, channels)
    assert torch.equal(words.unpack(packed, rows, channels), codes)


@pytest.mark.parametrize("bits", [*range(1, 9), 10])
def test_no_bit_is_wasted(bits: int) -> None:
    """At the widths of real models: as many bits as codes have."""
    for channels in (1536, 4096, 14336):
        words = Words.fitting(bits, channels, 128)
        assert words is not None and words.row(channels) * 32 == channels * bits


def test_pieces_do_not_cross_groups() -> None:
    assert [Words.fitting(4, 768, group).run for group in (32, 48, 16)] == [16, 8, 8]  # type: ignore[union-attr]
    assert Words.fitting(4, 960, 24) is None


@pytest.mark.parametrize("text", ["int4:g32", "int3:g64", "int8", "ternary", "binary:g32", "fp8", "nvfp4", "e3m2:g32"])
def test_the_stored_codes_come_back(text: str) -> None:
    scheme, weight = Scheme.parse(text, weights=True), torch.randn(5, 192)
    packed = Pack(Output(Quantize(Param("w"), scheme), "codes"), scheme)
    words = Words.fitting(scheme.bits, 192, scheme.group_of(192))
    assert words is not None
    laid = InWords(packed, scheme, 5, 192, words.run)
    value, stored = (e.evaluate({"w": weight}.__getitem__) for e in (laid, packed))
    assert torch.equal(laid.restored(value).view(torch.uint8), stored.view(torch.uint8))
    assert Expression.from_json(laid.to_json()) == laid


def test_what_words_stand_for_is_what_the_stored_codes_do() -> None:
    scheme, weight = Scheme.parse("int3:g32", weights=True), torch.randn(5, 96)
    parts = scheme.quantize(weight)
    words = Words.fitting(3, 96, 32)
    assert words is not None
    across = [parts[name].t() for name in ("scale", "zero")]
    ours = decode_words(words.pack(parts["codes"]), *across, None, "int3", 32, words.run, torch.float32)
    theirs = decode(scheme.pack(parts["codes"]), parts["scale"], parts["zero"], None, "int3", 32, True, torch.float32)
    assert torch.equal(ours, theirs)


def test_a_dropped_weights_codes_come_from_its_words() -> None:
    store, scheme = WeightStore(), Scheme.parse("int4:g32", weights=True)
    weight = torch.nn.Parameter(torch.randn(4, 64))
    rounded = Quantize(Param("w"), scheme)
    packed, scale = Pack(Output(rounded, "codes"), scheme), Output(rounded, "scale")
    expected = [store.evaluate(e, [weight]) for e in (packed, scale)]
    store.get(InWords(packed, scheme, 4, 64, 8), [weight])
    store.get(Transpose(scale, 0, 1), [weight])
    store.drop([weight])
    for expression, value in zip((packed, scale), expected, strict=True):
        assert torch.equal(store.evaluate(expression, [weight]), value)
