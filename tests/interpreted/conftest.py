"""Tests that run kernels in Triton's interpreter. They need TRITON_INTERPRET=1 before triton is imported, so they are
collected only in a process that was started with it: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    import numpy
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    def _fused(self, x, y, z):
        """x·y + z rounded once, as GPUs do; Triton's interpreter rounds the product, too."""
        exact = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = _fused

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _with_loaded_bounds(tensor, *scope):
        """A number that a kernel loads is an array of one element here, which numpy does not take for an index."""
        _patch_lang_tensor(tensor, *scope)
        scope[-1].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _with_loaded_bounds

    def _wide(x):
        """The numbers of a handle, those of bfloat16 as float32: the interpreter keeps their bits."""
        if x.dtype.scalar != tl.bfloat16:
            return x.data
        return (x.data.astype("uint32") << 16).view("float32")

    def _narrow(values):
        """float32 numbers as the bits of the nearest bfloat16."""
        rounded = torch.from_numpy(numpy.array(values, dtype="float32")).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def _binary(self, x, y, op, of_bits=interpreter.InterpreterBuilder.binary_op):
        """Arithmetic of bfloat16, which the interpreter does on its bits."""
        if x.dtype.scalar != tl.bfloat16 or op not in (numpy.add, numpy.subtract, numpy.multiply):
            return of_bits(self, x, y, op)
        return _narrow(op(_wide(x), _wide(y)))

    def _dot(self, a, b, c, *options, of_bits=interpreter.InterpreterBuilder.create_dot):
        if a.dtype.scalar != tl.bfloat16:
            return of_bits(self, a, b, c, *options)
        return of_bits(self, *(interpreter.TensorHandle(_wide(x), tl.float32) for x in (a, b)), c, *options)

    def _cast(self, x, kind, truncating=interpreter.InterpreterBuilder.cast_impl):
        """float32 to the nearest bfloat16, where the interpreter cuts the bits off."""
        if (x.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return truncating(self, x, kind)
        return _narrow(x.data)

    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.binary_op = _binary
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpreterBuilder.get_bf16 = lambda self, value: _narrow([value])
