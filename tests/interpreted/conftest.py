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

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _with_loaded_bounds(tensor, *scope):
        """A number that a kernel loads is an array of one element here, which numpy does not take for an index."""
        _patch_lang_tensor(tensor, *scope)
        scope[-1].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _with_loaded_bounds
