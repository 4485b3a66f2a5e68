"""fuseline::sparse_linear: y = σ(x)·W + (x − σ(x))·downᵀ·up + bias, where σ keeps the large channels of each row.

Weights are input-major, so that a channel that σ drops is a run of bytes that need not be read.

Sources: TEAL (Liu et al., 2025), thresholds alone; R-Sparse (Zhang et al., 2025), with the low-rank branch;
WINA (Chen et al., 2025), thresholds that differ by channel.
"""

from __future__ import annotations

import torch

from ._define import Kind, op


@op(
    "sparse_linear(Tensor x, Tensor weight, Tensor threshold, Tensor? down=None, Tensor? up=None, Tensor? bias=None, "
    "int dense_above=0) -> Tensor",
    kind=Kind.ANCHOR,
)
def sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    threshold: torch.Tensor,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dense_above: int = 0,
) -> torch.Tensor:
    """x: [..., n]; weight: [n, m]; down: [r, n]; up: [r, m]; bias: [m]; the result: [..., m] in x's dtype.

    σ keeps x_j where |x_j| > threshold_j; threshold: float32 [n], or [1] for one that all channels share. A NaN is
    kept. down and up come together: rank r stands in for the columns of W that σ drops. dense_above: calls of more rows
    than this multiply by the whole of W, without a mask; 0: none do.
    """
    if dense_above and x.numel() // max(1, x.shape[-1]) > dense_above:
        y = x @ weight
    else:
        dropped = x.abs() <= threshold
        y = x.masked_fill(dropped, 0) @ weight
        if down is not None and up is not None:
            y = y + (x.masked_fill(~dropped, 0) @ down.t()) @ up
    return y if bias is None else y + bias


@sparse_linear.fake
def _(x, weight, threshold, down=None, up=None, bias=None, dense_above=0):
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


sparse_linear.lowers_to("codegen/templates/sparse.py")
