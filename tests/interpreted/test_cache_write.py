"""New keys and values into a cache of codes in Triton's interpreter, against the naive twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.cached import emit_cached
from fuseline.compiler.ops import cache_write
from tests.codegen.cached_cases import NAMES, Cached, writes
from tests.codegen.regions import loaded, poison

WRITES = [
    ("int4:channel:g16", False, False),
    ("int4:token:g32", True, False),
    ("int2:channel:g16", False, False),
    ("int2:token:g16", True, True),
    ("int8:token:sym", False, True),
    ("int8:channel", False, False),
    ("fp8:token", True, False),
    ("fp8:channel:g32", False, False),
]


def run(scheme: str, values: bool, centred: bool, dtype: torch.dtype, folder: Path) -> None:
    """Tokens come one by one, in odd numbers, and more at once than the ring holds."""
    case = Cached("write", scheme, scheme, batch=2, centred=centred, capacity=192, block=64, window=24)
    launcher = emit_cached(writes(case, values, dtype), "write")
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, folder)
    ours, naive = (case.side(values, dtype, "cpu") for _ in range(2))
    length = torch.zeros(1, dtype=torch.int64)
    for added in (3, 84, 1, 1, 104, 1):
        x = torch.randn(2, added, case.kv_heads, case.head).to(dtype).transpose(1, 2)
        x[..., 3], x[:, :, ::7] = 0.5, 0.25
        given: list[Any] = [getattr(ours, name) for name in NAMES]
        assert call(*(g for g in given if g is not None), x, length) is None
        naive.write(x, length)
        length += added
        assert torch.equal(ours.recent, naive.recent)
        read, expected = ours.read(length), naive.read(length)
        if centred:  # sums in another order: a mean may differ by a rounding, and codes by one
            assert (read - expected).abs().max() <= 1.1 * naive.scale.max()
        else:
            assert torch.equal(read, expected)
    assert centred or all(torch.equal(getattr(ours, name), getattr(naive, name)) for name in ("codes", "scale"))


@pytest.mark.parametrize(("scheme", "values", "centred"), WRITES)
def test_writes(scheme: str, values: bool, centred: bool, tmp_path: Path) -> None:
    run(scheme, values, centred, torch.float16, tmp_path)
    if values:
        run(scheme, values, centred, torch.float32, tmp_path)


@pytest.mark.parametrize("scheme", ["int4:channel:g32", "int8:token:sym", "fp8:token:g32"])
def test_what_is_not_finite_spoils_its_group_alone(scheme: str, tmp_path: Path) -> None:
    case = Cached("nan", scheme, scheme, capacity=64, block=64, window=0)
    launcher = emit_cached(writes(case, False, torch.float32), "write")
    assert isinstance(launcher, Launcher), launcher
    side = case.side(False, torch.float32, "cpu")
    expected = case.side(False, torch.float32, "cpu")
    for part in (side.codes, side.scale, side.low):
        if part is not None:
            poison(part)
    x = torch.randn(1, 2, 64, 64)
    x[0, 0, 5, 7], x[0, 1, 40, 33], x[0, 1, 41] = float("nan"), float("inf"), 0.0
    length = torch.zeros(1, dtype=torch.int64)
    given = [getattr(side, name) for name in NAMES]
    loaded(launcher, tmp_path)(*(g for g in given if g is not None), x, length)
    cache_write(*(getattr(expected, name) for name in NAMES), x, length, scheme, 64, False)
    read, twin = side.read(length + 64), expected.read(length + 64)
    assert torch.equal(read.isnan(), twin.isnan()) and torch.equal(read.nan_to_num(0), twin.nan_to_num(0))
    assert 0 < read.isnan().sum() <= 2 * 64 and not read[0, 0, 5, 7].isfinite() and not read[0, 1, 40, 33].isfinite()
