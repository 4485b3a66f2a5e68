"""Every rewrite of rotate on every family of the table is proved."""

from __future__ import annotations

import pytest

import fuseline

pytest.importorskip("transformers")

from tests.families.promoted import captured
from tests.families.registry import ROWS
from tests.passes.test_rotate_families import QUICK


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ROWS])
def test_a_family_is_proved(name: str) -> None:
    try:
        before = captured(ROWS[name])
    except fuseline.UserError as reason:
        pytest.skip(f"not one graph: {reason.headline}")
    rotate = "rotate{r1,r2,r3,r4,kind=random-hadamard,seed=5,allow_empty}"
    _, proof = fuseline.prove(before, f"raise{{allow_empty}},{rotate}")
    if proof.count:
        proof.check()
