"""Inverses and solutions for batches of small symmetric positive definite matrices, in ``torch.linalg``'s conventions.

The inner step of the correction alone. ``ops/linalg.py`` has the functions.
"""

from .ops.linalg import InverseResult, SolveResult, spd_inverse, spd_inverse_ex, spd_solve, spd_solve_ex

__all__ = ["InverseResult", "SolveResult", "spd_inverse", "spd_inverse_ex", "spd_solve", "spd_solve_ex"]
