"""Tests that run kernels in Triton's interpreter. They need TRITON_INTERPRET=1 before triton is imported, so they are
collected only in a process that was started with it: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    from triton.runtime import interpreter

    def _fused(self, x, y, z):
        """x·y + z rounded once, as GPUs do; Triton's interpreter rounds the product, too."""
        exact = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = _fused

    _patched = interpreter._patch_lang_tensor

    def _with_index(tensor, scope):
        """A number that was computed as the end of a loop: NumPy 2.4 turns no array of one element into a number."""
        _patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = _with_index
