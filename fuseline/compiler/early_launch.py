"""What generated kernels and the runtime agree on for launches that begin early (`codegen/dependent.py`)."""

CONSTANT, OPTION = "DEPENDENT", "launch_pdl"
"""The kernels' parameter, and Triton's option of their launch."""
CAPABILITY = 90
"""The least compute capability, as Triton writes it."""
