"""Templates: kernels for anchors, each with a prologue and an epilogue slot."""
