"""The kernels of routed experts: `moe.py` launches what these files write."""
