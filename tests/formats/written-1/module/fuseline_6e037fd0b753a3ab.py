"""A lowered program: 4 kernels for 2 regions, 0 regions run through PyTorch.

Made by Fuseline from: write.py
by: raise/LayerNorm, fuse/layer_norm + linear + silu, fuse/linear + add
`call` takes the graph's inputs, then its weights; see the manifest beside this file. It may be edited and run again.
"""

from math import inf, nan

from torch import device

import fuseline  # the dialect's ops
from fuseline.runtime.arena import Plan

import torch
import triton
import triton.language as tl


# fuseline.layer_norm.default, aten.linear.default, aten.silu.default
# lines: write.py:34
# made by: raise/LayerNorm, fuse/layer_norm + linear + silu
# layer_norm → linear (16 x 8 float32) → silu
# reads 0.5 KB of weights: their transfer is the floor for one row
@triton.jit(do_not_specialize=["M"])
def run_linear_0_row(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, silu_out, M, BLOCK_N: tl.constexpr,
    ELEMENTS: tl.constexpr, STAGES: tl.constexpr,
):
    row = tl.program_id(0) % M  # neighbours read the same weights
    block = tl.program_id(0) // M
    x_row = x_ptr + row.to(tl.int64) * 8
    total = tl.zeros((8,), tl.float32)
    for k0 in range(0, 8, 8):
        k = k0 + tl.arange(0, 8)
        x = tl.load(x_row + k).to(tl.float32)
        total += x
    mean = tl.sum(total, 0) / 8
    total = tl.zeros((8,), tl.float32)
    for k0 in range(0, 8, 8):
        k = k0 + tl.arange(0, 8)
        x = tl.load(x_row + k).to(tl.float32)
        x = x - mean
        total += x * x
    rstd = tl.rsqrt(tl.sum(total, 0) / 8 + 1e-05)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc_linear = tl.zeros((BLOCK_N, ELEMENTS // 8, 8), tl.float32)
    for first in tl.range(0, 1, ELEMENTS // 8, num_stages=STAGES):
        piece = first + tl.arange(0, ELEMENTS // 8)
        j = (piece * 8)[:, None] + tl.arange(0, 8)[None, :]
        x_0 = tl.load(x_row + j).to(tl.float32)
        x_0 = (x_0 - mean) * rstd * tl.load(norm_weight_ptr + j).to(tl.float32) + tl.load(norm_bias_ptr + j).to(tl.float32)
        w_linear = tl.load(weight_ptr + (n * 8)[:, None, None] + j[None, :, :]).to(tl.float32)
        acc_linear += w_linear * x_0[None, :, :]
    linear = tl.sum(tl.sum(acc_linear, 2), 1) + tl.load(bias_ptr + n)
    silu = linear / (1 + tl.exp(-linear))
    tl.store(silu_out + row.to(tl.int64) * 16 + n, silu)


# fuseline.layer_norm.default, aten.linear.default, aten.silu.default
# lines: write.py:34
# made by: raise/LayerNorm, fuse/layer_norm + linear + silu
# layer_norm → linear (16 x 8 float32) → silu
# reads 0.5 KB of weights: their transfer is the floor for one row
@triton.jit(do_not_specialize=["M"])
def run_linear_0_tile(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, silu_out, M, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    pids_in_group = GROUP_M * tl.cdiv(16, BLOCK_N)
    pid = tl.program_id(0)
    first_m = pid // pids_in_group * GROUP_M
    height = min(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    m = (first_m + pid % pids_in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = pid % pids_in_group // height
    inside_m = (m < M)[:, None]
    x_rows = x_ptr + m.to(tl.int64)[:, None] * 8
    total = tl.zeros((BLOCK_M, 8), tl.float32)
    for k0 in range(0, 8, 8):
        k = k0 + tl.arange(0, 8)
        x = tl.load(x_rows + k[None, :], mask=inside_m, other=0.0).to(tl.float32)
        total += x
    mean = tl.sum(total, 1, keep_dims=True) / 8
    total = tl.zeros((BLOCK_M, 8), tl.float32)
    for k0 in range(0, 8, 8):
        k = k0 + tl.arange(0, 8)
        x = tl.load(x_rows + k[None, :], mask=inside_m, other=0.0).to(tl.float32)
        x = x - mean
        total += x * x
    rstd = tl.rsqrt(tl.sum(total, 1, keep_dims=True) / 8 + 1e-05)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < 16
    acc_linear = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j0 in range(0, 8, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        live = j < 8
        h_0 = tl.load(x_rows + j[None, :], mask=inside_m & live[None, :], other=0.0).to(tl.float32)
        h_0 = (tl.where(live[None, :], (h_0 - mean) * rstd * tl.load(norm_weight_ptr + j[None, :], mask=live[None, :], other=0.0).to(tl.float32) + tl.load(norm_bias_ptr + j[None, :], mask=live[None, :], other=0.0).to(tl.float32), 0.0)).to(tl.float32)
        w_linear = tl.load(weight_ptr + (n * 8)[None, :] + j[:, None], mask=live[:, None] & inside_n[None, :], other=0.0).to(tl.float32)
        acc_linear = tl.dot(h_0, w_linear, acc_linear, input_precision="ieee")
    linear = acc_linear + tl.load(bias_ptr + n[None, :], mask=inside_n[None, :], other=0)
    silu = linear / (1 + tl.exp(-linear))
    tl.store(silu_out + m[:, None].to(tl.int64) * 16 + n[None, :], silu, mask=inside_m & inside_n[None, :])


# aten.linear.default, aten.add.Tensor
# lines: write.py:34
# made by: fuse/linear + add
# linear (8 x 16 float32) → add
# reads 0.5 KB of weights: their transfer is the floor for one row
@triton.jit(do_not_specialize=["M"])
def run_linear_1_row(
    x_ptr, weight_ptr, bias_ptr, other_ptr, add_out, M, BLOCK_N: tl.constexpr, ELEMENTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) % M  # neighbours read the same weights
    block = tl.program_id(0) // M
    x_row = x_ptr + row.to(tl.int64) * 16
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc_linear = tl.zeros((BLOCK_N, ELEMENTS // 16, 16), tl.float32)
    for first in tl.range(0, 1, ELEMENTS // 16, num_stages=STAGES):
        piece = first + tl.arange(0, ELEMENTS // 16)
        j = (piece * 16)[:, None] + tl.arange(0, 16)[None, :]
        x_0 = tl.load(x_row + j).to(tl.float32)
        w_linear = tl.load(weight_ptr + (n * 16)[:, None, None] + j[None, :, :]).to(tl.float32)
        acc_linear += w_linear * x_0[None, :, :]
    linear = tl.sum(tl.sum(acc_linear, 2), 1) + tl.load(bias_ptr + n)
    other_value = tl.load(other_ptr + row.to(tl.int64) * 8 + n)
    add = other_value + linear
    tl.store(add_out + row.to(tl.int64) * 8 + n, add)


# aten.linear.default, aten.add.Tensor
# lines: write.py:34
# made by: fuse/linear + add
# linear (8 x 16 float32) → add
# reads 0.5 KB of weights: their transfer is the floor for one row
@triton.jit(do_not_specialize=["M"])
def run_linear_1_tile(
    x_ptr, weight_ptr, bias_ptr, other_ptr, add_out, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    pids_in_group = GROUP_M * tl.cdiv(8, BLOCK_N)
    pid = tl.program_id(0)
    first_m = pid // pids_in_group * GROUP_M
    height = min(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    m = (first_m + pid % pids_in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = pid % pids_in_group // height
    inside_m = (m < M)[:, None]
    x_rows = x_ptr + m.to(tl.int64)[:, None] * 16
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < 8
    acc_linear = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j0 in range(0, 16, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        live = j < 16
        h_0 = tl.load(x_rows + j[None, :], mask=inside_m & live[None, :], other=0.0).to(tl.float32)
        w_linear = tl.load(weight_ptr + (n * 16)[None, :] + j[:, None], mask=live[:, None] & inside_n[None, :], other=0.0).to(tl.float32)
        acc_linear = tl.dot(h_0, w_linear, acc_linear, input_precision="ieee")
    linear = acc_linear + tl.load(bias_ptr + n[None, :], mask=inside_n[None, :], other=0)
    other_value = tl.load(other_ptr + m[:, None].to(tl.int64) * 8 + n[None, :], mask=inside_m & inside_n[None, :], other=0)
    add = other_value + linear
    tl.store(add_out + m[:, None].to(tl.int64) * 8 + n[None, :], add, mask=inside_m & inside_n[None, :])


def run_linear_0(x, norm_weight, norm_bias, weight, bias, silu_out=None):
    rows = x.reshape(-1, 8).contiguous()
    m = rows.shape[0]
    if silu_out is None:
        silu_out = torch.empty((*x.shape[:-1], 16), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if m <= 4:
            run_linear_0_row[(m * 4,)](
                rows, norm_weight.contiguous(), norm_bias.contiguous(), weight.contiguous(), bias.contiguous(), silu_out, m,
                BLOCK_N=4, ELEMENTS=8, STAGES=1, num_warps=8, num_stages=1,
            )
        else:
            block_m = 16 if m <= 32 else 32
            run_linear_0_tile[(triton.cdiv(m, block_m) * 1,)](
                rows, norm_weight.contiguous(), norm_bias.contiguous(), weight.contiguous(), bias.contiguous(), silu_out, m,
                BLOCK_M=block_m, BLOCK_N=32, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=2,
            )
    return silu_out


def run_linear_1(x, weight, bias, other, add_out=None):
    rows = x.reshape(-1, 16).contiguous()
    m = rows.shape[0]
    if add_out is None:
        add_out = torch.empty((*x.shape[:-1], 8), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if m <= 4:
            run_linear_1_row[(m * 2,)](
                rows, weight.contiguous(), bias.contiguous(), other.contiguous(), add_out, m, BLOCK_N=4, ELEMENTS=16, STAGES=1,
                num_warps=8, num_stages=1,
            )
        else:
            block_m = 16 if m <= 32 else 32
            run_linear_1_tile[(triton.cdiv(m, block_m) * 1,)](
                rows, weight.contiguous(), bias.contiguous(), other.contiguous(), add_out, m, BLOCK_M=block_m, BLOCK_N=32,
                BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=2,
            )
    return add_out


def planned_sizes():
    """Shape, strides, dtype, first and last use of each result that nothing keeps beyond the call."""
    return (
        ((4, 16), None, torch.float32, 7, 8),
    )


PLAN = Plan(planned_sizes)
def call(
    x,
    weight_norm_weight,
    weight_norm_bias,
    weight_up_weight,
    weight_up_bias,
    weight_down_weight,
    weight_down_bias,
):
    planned = PLAN(x)
    linear_0 = run_linear_0(x, weight_norm_weight, weight_norm_bias, weight_up_weight, weight_up_bias, silu_out=planned[0]);  weight_norm_weight = weight_norm_bias = weight_up_weight = weight_up_bias = None
    linear_2 = run_linear_1(linear_0, weight_down_weight, weight_down_bias, x);  linear_0 = weight_down_weight = weight_down_bias = x = None
    return (linear_2,)
