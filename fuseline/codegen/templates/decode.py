"""The text of the two kernels of flash decoding; `attention.py` says what they are for and launches them."""

from __future__ import annotations

import torch

from ..kernel_text import call
from .config import next_power_of_two
from .text import Text, joined, load

LOG2_E = 1.4426950408889634


def split_kernel(
    name: str,
    head: int,
    head_v: int,
    dtype: torch.dtype,
    mask: torch.dtype | None,
    kind: str,
    scale: float,
    softcap: float,
) -> tuple[str, list[str]]:
    """One program: the rows of one key head over KEYS keys. Grid: (batch times key heads, splits).

    Rows are ordered query first, then query head of the group. Writes unnormalised sums to `parts` and, to `stats`,
    each row's maximum (in units of log 2) and its sum of exponentials. Returns the source and its parameters.
    """
    strided = ["q", "k", "v"] + (["mask"] if mask is not None else [])
    parameters = [f"{a}_ptr" for a in (*strided, "parts", "stats")]
    parameters += [f"{a}_s{i}" for a in strided for i in range(4)]
    parameters += ["heads", "S", "T", "G", "splits"]
    parameters += {"full": [], "causal": ["offset"], "sliding": ["offset", "window"]}[kind]
    constants = ["ROWS", "KEYS", "BLOCK_T"]
    wide, wide_v = next_power_of_two(max(head, 16)), next_power_of_two(max(head_v, 16))
    in_d, in_dv = (f"d < {head}" if wide != head else None), (f"dv < {head_v}" if wide_v != head_v else None)
    precision = ', input_precision="ieee"' if dtype == torch.float32 else ""
    text = Text()
    text.add("@triton.jit", *call(f"def {name}(", [*parameters, *(f"{c}: tl.constexpr" for c in constants)], "):"))
    q_pointer = "q_rows[:, None] + d[None, :] * q_s3"
    with text.indented():
        text.add(
            "pid = tl.program_id(0).to(tl.int64)",
            "part = tl.program_id(1)",
            "batch = pid // heads",
            "kv_head = pid % heads",
            "row = tl.arange(0, ROWS)",
            "query = row // G",
            "head = kv_head * G + row % G",
            "inside_row = row < S * G",
            f"d = tl.arange(0, {wide})",
            f"dv = tl.arange(0, {wide_v})",
            "q_rows = q_ptr + batch * q_s0 + head * q_s1 + query * q_s2",
            f"q = {load(q_pointer, ('inside_row[:, None]', in_d and f'({in_d})[None, :]'))}",
            "k_head = k_ptr + batch * k_s0 + kv_head * k_s1",
            "v_head = v_ptr + batch * v_s0 + kv_head * v_s1",
        )
        if mask is not None:
            text.add("mask_rows = mask_ptr + batch * mask_s0 + head * mask_s1 + query * mask_s2")
        text.add(
            'top = tl.full((ROWS,), float("-inf"), tl.float32)',
            "total = tl.zeros((ROWS,), tl.float32)",
            f"acc = tl.zeros((ROWS, {wide_v}), tl.float32)",
            "first = part * KEYS",
            "last = min(first + KEYS, T)",
        )
        with text.block("for t0 in range(0, KEYS, BLOCK_T):"):
            text.add(
                "t = first + t0 + tl.arange(0, BLOCK_T)",
                "inside = t < last",
                "seen = inside_row[:, None] & inside[None, :]",
            )
            if kind != "full":
                text.add("seen = seen & (t[None, :] <= query[:, None] + offset)")
            if kind == "sliding":
                text.add("seen = seen & (t[None, :] > query[:, None] + offset - window)")
            if mask is not None:
                pointer = "mask_rows[:, None] + t.to(tl.int64)[None, :] * mask_s3"
                if mask == torch.bool:
                    text.add(f"seen = seen & (tl.load({pointer}, mask=seen, other=0) != 0)")
                else:
                    # A mask's most negative number must not become minus infinity: a row that has nothing else
                    # weighs its keys alike.
                    text.add(
                        f"bias = tl.load({pointer}, mask=seen, other=0).to(tl.float32)",
                        'seen = seen & (bias != float("-inf"))',
                        f"bias = tl.maximum(bias * {LOG2_E}, {torch.finfo(torch.float32).min})",
                    )
            with text.block("if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:"):
                k_pointer = "k_head + t.to(tl.int64)[None, :] * k_s2 + d[:, None] * k_s3"
                text.add(f"k = {load(k_pointer, ('inside[None, :]', in_d and f'({in_d})[:, None]'))}")
                v_pointer = "v_head + t.to(tl.int64)[:, None] * v_s2 + dv[None, :] * v_s3"
                text.add(f"v = {load(v_pointer, ('inside[:, None]', in_dv and f'({in_dv})[None, :]'))}")
                dot = f"tl.dot(q, k{precision})"
                if softcap:
                    x = f"{dot} * {2 * scale / softcap}"
                    text.add(f"logits = {softcap * LOG2_E} * (1 - 2 / (tl.exp({x}) + 1))")
                else:
                    text.add(f"logits = {dot} * {scale * LOG2_E}")
                if mask is not None and mask != torch.bool:
                    text.add("logits += bias")
                text.add(
                    'logits = tl.where(seen, logits, float("-inf"))',
                    "higher = tl.maximum(top, tl.max(logits, 1))",
                    'level = tl.where(higher == float("-inf"), 0.0, higher)',
                    "p = tl.exp2(logits - level[:, None])",
                    "fade = tl.exp2(top - level)",
                    "total = total * fade + tl.sum(p, 1)",
                    f"acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v{precision})",
                    "top = higher",
                )
        text.add(
            "slot = (pid * splits + part) * (S * G) + row",
            f"tl.store(parts_ptr + slot[:, None] * {head_v} + dv[None, :], acc"
            f"{joined(('inside_row[:, None]', in_dv and f'({in_dv})[None, :]'))})",
            "tl.store(stats_ptr + slot, top, mask=inside_row)",
            "count = tl.num_programs(0).to(tl.int64) * splits * (S * G)",
            "tl.store(stats_ptr + count + slot, total, mask=inside_row)",
        )
    return str(text), [*parameters, *constants]


def join_kernel(name: str, head_v: int, dtype: torch.dtype) -> tuple[str, list[str]]:
    """One program: one row of the result, from its parts. Grid: batch times query heads times queries."""
    parameters = ["parts_ptr", "stats_ptr", "out_ptr", *(f"out_s{i}" for i in range(4))]
    parameters += ["heads", "S", "H", "G", "splits"]
    wide = next_power_of_two(head_v)
    in_dv = f"dv < {head_v}" if wide != head_v else None
    text = Text()
    text.add("@triton.jit", *call(f"def {name}(", [*parameters, "SPLITS: tl.constexpr", "CHUNK: tl.constexpr"], "):"))
    with text.indented():
        text.add(
            "pid = tl.program_id(0).to(tl.int64)",
            "query = pid % S",
            "head = pid // S % H",
            "batch = pid // S // H",
            f"dv = tl.arange(0, {wide})",
            "count = tl.num_programs(0).to(tl.int64) * splits",
            "first = (batch * heads + head // G) * splits * (S * G) + query * G + head % G",
            'top = float("-inf")',
            "total = 0.0",
            f"acc = tl.zeros(({wide},), tl.float32)",
        )
        part = f"parts_ptr + slot[:, None] * {head_v} + dv[None, :]"
        with text.block("for i0 in range(0, SPLITS, CHUNK):"):
            text.add(
                "i = i0 + tl.arange(0, CHUNK)",
                "inside = i < splits",
                "slot = first + i * (S * G)",
                'tops = tl.load(stats_ptr + slot, mask=inside, other=float("-inf"))',
                "totals = tl.load(stats_ptr + count + slot, mask=inside, other=0.0)",
                f"part = {load(part, ('inside[:, None]', in_dv and f'({in_dv})[None, :]'))}",
                "higher = tl.maximum(top, tl.max(tops, 0))",
                'level = tl.where(higher == float("-inf"), 0.0, higher)',
                "weight = tl.exp2(tops - level)",
                "fade = tl.exp2(top - level)",
                "total = total * fade + tl.sum(weight * totals, 0)",
                "acc = acc * fade + tl.sum(weight[:, None] * part, 0)",
                "top = higher",
            )
        text.add(
            "result = acc / tl.where(total == 0.0, 1.0, total)",
            "out = out_ptr + batch * out_s0 + head * out_s1 + query * out_s2 + dv * out_s3",
            f"tl.store(out, result.to(out_ptr.dtype.element_ty){joined((in_dv,))})",
        )
    return str(text), [*parameters, "SPLITS", "CHUNK"]
