"""The options of `merge-experts` that are words."""

from __future__ import annotations

import enum


class Method(enum.Enum):
    """What becomes of a layer's experts."""

    PUZZLE = "puzzle"  # pairs in one matrix, with masks and signs (PuzzleMoE)
    AVERAGE = "average"  # random groups, averaged
    HC = "hc"  # clusters of alike outputs, averaged by frequency (HC-SMoE)
    REAP = "reap"  # those that contribute least are left out (REAP)
    PARTIAL = "partial-preservation"  # the most important stay, the others are merged into bases
    MILO = "milo"  # low-bit codes with low-rank compensation (MiLo)


class Saliency(enum.Enum):
    """What decides which of two weights is kept."""

    ACTIVATION = "activation"  # |w| times the norm of its input over the expert's tokens
    MAGNITUDE = "magnitude"  # |w|


class Pairs(enum.Enum):
    """Which experts become a pair."""

    RANDOM = "random"
    SEARCHED = "searched"  # so that all pairs together cost least


class Pack(enum.Enum):
    """What pairs are stored as."""

    BF16 = "bf16"  # 16-bit words
    FP8 = "fp8"  # 10 bits a pair of E4M3 numbers
    INT4 = "int4"  # 6 bits a pair of 4-bit integers
    NONE = "none"  # matrices as large as before, to measure the merge alone


class Router(enum.Enum):
    """What becomes of the router's rows."""

    AUTO = "auto"  # map for average and hc, slice for reap and partial-preservation
    MAP = "map"  # all are kept, and a choice of any member is one of its group
    SLICE = "slice"  # one a group is kept, and the others are never chosen


class Importance(enum.Enum):
    """What experts are ranked by."""

    REAP = "reap"  # the mean over its tokens of weight times the norm of its output
    FREQUENCY = "frequency"  # how many tokens it has
    GATE = "gate"  # the sum of its weights


class Ranks(enum.Enum):
    """How low ranks are divided among a layer's experts."""

    UNIFORM = "uniform"
    KURTOSIS = "kurtosis"  # by how heavy the tails of its weights are
    FREQUENCY = "frequency"  # by how many tokens it has
