"""The template of linears whose weights are codes of any number format, on tensor cores (`kernel.py`)."""
