"""Algebra: what an exact pass's rewrites claim, read from the graph before and after, and proved (Pnueli et al., 1998).

A rewrite replaces a node by another. Both are unfolded to the values that they have in common (`region.py`), and
written as row vectors times matrices in non-commutative sympy (`values.py`, `linear.py`, `matrices.py`). The rewrite is
proved where the difference becomes zero under the axioms that the pass declares (`axioms.py`, `normal.py`), and both
sides are computed on random numbers besides (`numeric.py`). Nothing of the code that made the rewrite is asked.
`observe/prove.py` does all this as an observer of a pipeline.
"""
