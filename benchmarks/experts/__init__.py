"""What `moe_layer.py` measures: layers of routed experts, ours and those of transformers."""
