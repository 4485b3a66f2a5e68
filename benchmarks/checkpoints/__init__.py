"""What `checkpoint.py` measures: its points and candidates, the model, whose turn the GPU is, the plot."""
