"""Quantization schemes beside the same schemes of other libraries: settings, scores, and the libraries' own calls."""
