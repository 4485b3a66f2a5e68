"""Caches of codes: what they cost in accuracy, and what reading them costs in time."""
