"""Problems for spd_inverse_cuda and spd_solve_cuda, and the float64 answer to each; numpy only, as
precondition_cases.py.

Above the diagonal, between the rows of A and behind an array's last element lies NaN, or memory that is not ours.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import precondition_cases as cases
import simt_library as simt


@dataclasses.dataclass
class SpdCase:
    """``batch`` matrices of n rows.

    ``columns`` of B; None: the inverse.  ``a_by_columns``, ``b_by_columns``: neighbours in memory are elements of a
    column.  ``one_b``: all matrices have the same B.  ``spoil``: (matrix, unit, value) of the diagonal.
    """

    n: int
    batch: int = 2
    columns: int | None = None
    a_by_columns: bool = False
    b_by_columns: bool = False
    one_b: bool = False
    spoil: tuple[tuple[int, int, float], ...] = ()
    device: str = "sm_90"


class Problem:
    """The arrays of a case, with fresh results."""

    def __init__(self, case: SpdCase):
        rng = np.random.default_rng(5)
        n, batch = case.n, case.batch
        rows = rng.standard_normal((batch, 2 * n + 8, n)) + 0.3
        matrices = (rows.swapaxes(1, 2) @ rows / (2 * n + 8) + 0.05 * np.eye(n)).astype(np.float32)
        for matrix, unit, value in case.spoil:
            matrices[matrix, unit, unit] = value
        self.matrices = matrices.astype(np.float64)
        stored = np.full((batch, n, n + 3), np.nan, np.float32)
        stored[:, :, :n] = np.where(np.tril(np.ones((n, n), bool)), matrices, np.nan)
        if case.a_by_columns:
            stored[:, :, :n] = stored[:, :, :n].swapaxes(1, 2).copy()
        flat = stored.reshape(-1)
        self.a = cases.on_256_bytes(flat[: flat.size - 3])  # behind the last row there is nothing
        self.a_strides = (n * (n + 3), 1, n + 3) if case.a_by_columns else (n * (n + 3), n + 3, 1)
        self.b, self.b_strides = None, (0, 0, 0)
        shape = (batch, n, n)
        if case.columns is not None:
            shape = (batch, n, case.columns)
            b = rng.standard_normal((1 if case.one_b else batch, n, case.columns)).astype(np.float32)
            self.right = b.astype(np.float64)
            self.b = cases.on_256_bytes(b.swapaxes(1, 2) if case.b_by_columns else b)
            of_batch = 0 if case.one_b else n * case.columns
            self.b_strides = (of_batch, 1, n) if case.b_by_columns else (of_batch, case.columns, 1)
        self.result = cases.on_256_bytes(np.full(shape, 7.0, np.float32))
        self.info = cases.on_256_bytes(np.full(batch, -9, np.int32))


def check(library: simt.Library, case: SpdCase) -> list[Problem]:
    """One launch against float64.  Returns what it wrote."""
    problem = Problem(case)
    library.spd(problem, case.n, case.columns, case.device)
    expected = np.full(problem.result.shape, np.nan)
    for m, matrix in enumerate(problem.matrices):
        minor = cases.is_positive_definite(matrix)
        assert problem.info[m] == minor, (case, m, problem.info[m], minor)
        if minor != 0:  # the kernel's own NaN, not what shared memory held before
            assert (problem.result[m].view(np.uint32) == np.float32(np.nan).view(np.uint32)).all(), (case, m)
        elif case.columns is None:
            expected[m] = np.linalg.inv(matrix)
            assert np.array_equal(problem.result[m], problem.result[m].T), (case, m, "symmetric, bit for bit")
        else:
            expected[m] = np.linalg.solve(matrix, problem.right[0 if case.one_b else m])
    if expected.size > 0:
        error = cases.relative_error(problem.result, expected)
        assert error <= 200 * cases.EPS[simt.FLOAT32], (case, error)
    return [problem]


def written(problems: list[Problem]) -> list[bytes]:
    """Return every byte that the launch wrote."""
    return [array.tobytes() for problem in problems for array in (problem.result, problem.info)]


S = SpdCase
# One warp, four, eight (the inverse by sweep.cuh) and sixteen a matrix; small enough for every sanitizer.
SMALL = {
    "inverse of 1": S(1),
    "inverse of 20": S(20, batch=3),
    "inverse of 40, by columns": S(40, a_by_columns=True),
    "inverse of 100": S(100),
    "inverse of 130": S(130, batch=1),
    "inverse, spoiled": S(40, batch=3, spoil=((0, 33, -1.0), (2, 0, 0.0))),
    "inverse of 70, spoiled": S(70, batch=3, spoil=((0, 69, -1.0), (1, 4, np.nan))),
    "solve of 20": S(20, columns=5),
    "solve of 40": S(40, columns=70),
    "solve of 70, by columns": S(70, columns=3, a_by_columns=True, b_by_columns=True),
    "solve of 130": S(130, batch=1, columns=33),
    "solve with one B": S(33, batch=3, columns=4, one_b=True),
    "solve, spoiled": S(40, batch=3, columns=4, spoil=((1, 20, -1.0),)),
    "solve of no columns": S(20, columns=0),
    "inverse of no rows": S(0),
    "solve of no rows": S(0, columns=5),
}
LARGE = {"solve of many matrices": S(3, batch=140, columns=40)}  # several blocks of columns a CTA
PREFIX = "spd, "


def named(name: str) -> SpdCase:
    """A case by its name without PREFIX."""
    return {**SMALL, **LARGE}[name]
