"""Element types in kernels: what a value is stored as, and what it is computed in."""

from __future__ import annotations

import math

import torch

#: dtype → (name in `tl`, pointer element in a kernel signature)
NAMES: dict[torch.dtype, tuple[str, str]] = {
    torch.float64: ("float64", "fp64"),
    torch.float32: ("float32", "fp32"),
    torch.float16: ("float16", "fp16"),
    torch.bfloat16: ("bfloat16", "bf16"),
    torch.int64: ("int64", "i64"),
    torch.int32: ("int32", "i32"),
    torch.int16: ("int16", "i16"),
    torch.int8: ("int8", "i8"),
    torch.uint8: ("uint8", "u8"),
    torch.bool: ("int1", "i1"),
}


def is_supported(dtype: torch.dtype) -> bool:
    """Whether kernels can hold values of this type."""
    return dtype in NAMES


def is_byte_float(dtype: torch.dtype) -> bool:
    """Whether it is one of the floating-point types of 8 bits, which kernels of rows hold as bytes."""
    return dtype.is_floating_point and dtype.itemsize == 1


def triton_type(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `"tl.bfloat16"`. KeyError for a type that `is_supported` denies."""
    return f"tl.{NAMES[dtype][0]}"


def pointer_type(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `"*bf16"`, as Kernel.signature wants it. KeyError as above."""
    return f"*{NAMES[dtype][1]}"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a value of `dtype` has inside a kernel: float32 for 16-bit floats, otherwise its own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def cast(text: str, source: torch.dtype, target: torch.dtype) -> str:
    """`text`, a name or a parenthesised expression of type `source`, as the type `target`."""
    if source == target:
        return text
    if target == torch.bool:
        return f"({text} != 0)"
    if source == torch.float64 and target in (torch.float16, torch.bfloat16):
        return f"{text}.to(tl.float32).to({triton_type(target)})"  # the way PyTorch rounds, too
    return f"{text}.to({triton_type(target)})"


def rounded(text: str, compute: torch.dtype, dtype: torch.dtype) -> str:
    """`text`, of type `compute`, rounded to `dtype` and held in the compute type of `dtype`."""
    return cast(cast(text, compute, dtype), dtype, compute_dtype(dtype))


def literal(value: float | int | bool, dtype: torch.dtype) -> str:
    """A Python number as a Triton expression of exactly the type `dtype`.

    Plain literals are float32, int32 or bool for Triton; any other type is spelt out, or a float64 constant would
    pass through float32 and an int64 one would give an int32 result.
    """
    if dtype.is_floating_point:
        number = float(value)
        text = repr(number) if math.isfinite(number) else f'float("{number}")'
        if dtype == torch.float32 and (number == 0 or not math.isfinite(number) or 2.0**-126 <= abs(number) < 2.0**127):
            return f"({text})" if text.startswith("-") else text
        if dtype == torch.float32 and math.isfinite(number):
            text = repr(torch.tensor(number, dtype=torch.float32).item())
            text = f'float("{text}")' if "inf" in text else text
        return f"tl.full((), {text}, {triton_type(dtype)})"
    if dtype == torch.bool:
        return f"tl.full((), {1 if value else 0}, tl.int1)"
    number = int(value)
    if dtype == torch.int32:
        return f"({number})" if number < 0 else str(number)
    return f"tl.full((), {number}, {triton_type(dtype)})"
