"""Tests that run kernels in Triton's interpreter. They need TRITON_INTERPRET=1 before triton is imported, so they are
collected only in a process that was started with it: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
