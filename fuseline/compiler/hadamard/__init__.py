"""Hadamard matrices of every size, and what takes their place where none is known.

    factor(14336)  →  K = 28, 2^9        H_28 (Paley) ⊗ H_2 ⊗ … ⊗ H_2
    factor(11008)  →  K = 172, 2^6       H_172 (Goethals-Seidel) ⊗ H_64
    factor(94)     →  K = 47, 2^1        the Hartley matrix of 47 points ⊗ H_2: orthogonal, its entries of unequal size

Every matrix here is symmetric, so it is its own inverse up to a factor: H·H = n·I. All are generated and then verified
in exact integer arithmetic; none is stored but four triples of sequences of 23 to 43 signs.
"""

from .cores import ORDERS, core_signs
from .factors import Factors, core, factor, hadamard_matrix
from .signs import random_orthogonal, random_signs

__all__ = ["ORDERS", "Factors", "core", "core_signs", "factor", "hadamard_matrix", "random_orthogonal", "random_signs"]
