"""The runtime: what stands between a call and a compiled graph."""
