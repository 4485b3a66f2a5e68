"""What `linear_kernels.py` sweeps."""
