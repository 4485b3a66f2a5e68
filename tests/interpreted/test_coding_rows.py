"""Kernels that make codes of values and values of codes, for every format, against the naive twins to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fuseline.compiler import products
from fuseline.compiler.formats import FORMATS
from fuseline.compiler.ops import decode, encode, glu, rms_norm
from tests.codegen.regions import emitted, error, loaded, region

ENCODED = [name for name, form in FORMATS.items() if form.scaling != "e4m3" and not name.startswith("midrise")]
MEANS = ("ternary", "binary")  # their scale is a mean, whose sum may be taken in another order


def encoding(name: str, group: int) -> Callable[[torch.Tensor], Any]:
    return lambda x: encode(x, name, group)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (t.view(torch.uint8) if t.dtype.is_floating_point and t.dtype.itemsize == 1 else t for t in (a, b))
    return bool(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def hard(rows: int, channels: int) -> torch.Tensor:
    """Rows of ordinary, large and tiny values, of zeros, of ties, with a NaN and with an infinity."""
    x = torch.randn(rows, channels)
    factors = torch.tensor([1.0, 1e30, 1e-38, 1e-44, 0.0, 3e38, 1.0, 1.0])
    x = x.clamp(-1, 1) * factors.repeat(-(-rows // 8))[:rows, None]
    x[5::8] = torch.randint(-12, 13, x[5::8].shape) / 4
    x[6::8, 1], x[7::8, 2] = float("nan"), float("inf")
    return x


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ENCODED)
def test_encode(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    for group, channels in ((form.group or 96, 96), (form.group or 32, 96)):
        function = encoding(name, group)
        call = loaded(emitted(function, torch.randn(4, channels), dynamic={0: (0,)}), tmp_path)
        x = hard(9, channels)
        (codes, scale), (expected, expected_scale) = call(x), function(x)
        assert codes.dtype == expected.dtype and scale.shape == expected_scale.shape
        if name in MEANS:
            assert torch.allclose(scale, expected_scale, rtol=1e-6, atol=0, equal_nan=True)
            assert (codes != expected).float().mean() < 0.01
        else:
            assert same(scale, expected_scale), (scale, expected_scale)
            assert same(codes, expected), (codes[codes.view(torch.uint8) != expected.view(torch.uint8)], name)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packed", [False, True], ids=["bytes", "packed"])
def test_decode(name: str, packed: bool, tmp_path: Path) -> None:
    form, channels = FORMATS[name], 96
    element, group = form.element, form.group or 32
    x = torch.randn(5, channels)
    codes, scale = encode(x, name, group)
    outer = None
    if form.scaling == "e8m0":
        scale = torch.randint(0, 256, scale.shape, dtype=torch.uint8)
    elif form.scaling == "e4m3":
        scale, outer = scale.to(torch.float8_e4m3fn), torch.tensor([0.5])
    stored = element.pack(codes) if packed else codes
    inputs = [t for t in (stored, scale, outer) if t is not None]
    for dtype in (torch.float32, torch.float16):
        function = decoding(name, group, packed, dtype)
        call = loaded(emitted(function, *inputs, dynamic={0: (0,), 1: (0,)}), tmp_path)
        assert same(call(*inputs), function(*inputs))


def decoding(name: str, group: int, packed: bool, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    def function(codes: torch.Tensor, scale: torch.Tensor, *outer: torch.Tensor) -> torch.Tensor:
        return decode(codes, scale, None, outer[0] if outer else None, name, group, packed, dtype)

    return function


@pytest.mark.parametrize("bits", [8, 5, 4, 3])
def test_decode_with_zero_points(bits: int, tmp_path: Path) -> None:
    codes = torch.randint(0, 2**bits, (5, 96), dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (5, 3), dtype=torch.uint8)
    function = lambda c, s, z: decode(c, s, z, None, f"int{bits}", 32, False, torch.float32)
    inputs = codes, torch.rand(5, 3), zero
    assert same(loaded(emitted(function, *inputs), tmp_path)(*inputs), function(*inputs))


def check_values(tmp_path_factory: pytest.TempPathFactory, values: list[float], name: str) -> None:
    """NaN, infinities, denormals and what hypothesis thinks of."""
    group = FORMATS[name].group or 16
    x = torch.tensor(values).repeat(group // 16).view(1, -1)
    function = encoding(name, group)
    call = loaded(emitted(function, x), tmp_path_factory.mktemp("coding"))
    assert all(same(a, b) for a, b in zip(call(x), function(x), strict=True))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.floats(width=32), min_size=16, max_size=16), st.sampled_from([n for n in ENCODED if n not in MEANS]))
def test_any_values(tmp_path_factory: pytest.TempPathFactory, values: list[float], name: str) -> None:
    check_values(tmp_path_factory, values, name)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32), min_size=16, max_size=16), st.sampled_from([n for n in ENCODED if n not in MEANS]))
def test_more_values(tmp_path_factory: pytest.TempPathFactory, values: list[float], name: str) -> None:
    check_values(tmp_path_factory, values, name)


def test_norms_and_gated_units_are_coded_in_their_kernel(tmp_path: Path) -> None:
    """norm → encode and SwiGLU → encode: one launch each."""
    x, w = torch.randn(3, 64), torch.rand(64)
    for name in ("int8", "e4m3", "mxfp4"):
        group = FORMATS[name].group or 64
        for before in (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: glu(x, x + w, "silu")):
            function = followed(before, encoding(name, group))
            launcher = emitted(function, x, w)
            assert len(launcher.kernels) == 1
            (codes, scale), (expected, expected_scale) = loaded(launcher, tmp_path)(x, w), function(x, w)
            assert error(scale, expected_scale.double()) < 1e-6
            changed = (codes.view(torch.uint8) != expected.view(torch.uint8)).float().mean()
            assert changed < 0.02, "a value on the edge between two codes may take the other"


def followed(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w: second(first(x, w))


def test_what_one_pass_cannot_do_is_refused() -> None:
    x = torch.randn(4, 64)
    for name, group, reason in (("int8", 0, "one scale for all rows"), ("nvfp4", 16, "within a token's own scale")):
        (node,) = (n for n in region(encoding(name, group), (x,)).graph.nodes if n.target is encode.overload)
        assert reason in str(products.refuse_rows(node))
