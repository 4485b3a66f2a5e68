"""Decoding with a static cache: the model, the state that every candidate starts from, the candidates, the loop."""
