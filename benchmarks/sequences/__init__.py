"""Long contexts on several GPUs: the model, the methods, and what one process of a method runs."""
