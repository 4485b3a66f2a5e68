"""The options of `rsparse` that are words."""

from __future__ import annotations

import enum


class Score(enum.Enum):
    """What a channel's size is."""

    ABS = "abs"
    NORM_WEIGHTED = "norm-weighted"


class LowRankUse(enum.Enum):
    """Where the low-rank branch is used."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Prefill(enum.Enum):
    """What calls of many rows do."""

    DENSE = "dense"
    SPARSE = "sparse"
