"""The chunk kernels of CUDA, run on the CPU, against LAPACK's yardsticks (see test_lapack_ratios.py).

factor  || A - L L^T || / (n eps || A ||)  <= 1        solve  || B - A X || / (|| A || || X || eps)  <= 3
"""

import shutil

import numpy as np
import pytest
import simt_library as simt
import test_lapack_ratios as lapack

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def library():
    return simt.load()


@pytest.mark.parametrize("n", lapack.SIZES)
def test_factor_ratio(library, n):
    library.schedule(seed=n)
    for index, kind in enumerate(lapack.TYPES):
        a = lapack.matrix(kind, n, np.float32, np.random.default_rng([n, index]))
        lda = max(1, n) + index % 2
        storage = lapack.column_major(a, lda, np.nan)
        before = storage.copy()
        assert library.cholesky(n, storage, lda) == (0, 0), kind
        assert lapack.untouched(storage, before, n), kind
        factor, exact = lapack.lower(storage, n).astype(np.longdouble), a.astype(np.longdouble)
        error = lapack.norm1(exact - lapack.product(factor, factor.T))
        assert error <= n * EPS * lapack.norm1(exact), (kind, error)


def solved(library, n, kind, index, nrhs, extra, inverse=False):
    """(A, B, wanted X, X) in extended precision."""
    rng = np.random.default_rng([n, index])
    a = lapack.matrix(kind, n, np.float32, rng)
    storage = lapack.column_major(a, n + extra, np.nan)
    if not inverse:  # which factors itself
        assert library.cholesky(n, storage, n + extra) == (0, 0)
    wanted = rng.uniform(-1, 1, (n, nrhs)) * (1 / lapack.norm1(a) if kind == "tiny" else 1)
    b = np.full((nrhs, n + extra), np.nan, np.float32)
    b[:, :n] = (a.astype(np.float64) @ wanted).T
    right, kept, rest = b[:, :n].T.astype(np.longdouble), storage.copy(), b[:, n:].tobytes()
    assert library.cholesky_solve(n, nrhs, storage, n + extra, b, n + extra, inverse) == 0
    assert storage.tobytes() == kept.tobytes()
    assert b[:, n:].tobytes() == rest
    return a.astype(np.longdouble), right, wanted, b[:, :n].T.astype(np.longdouble)


@pytest.mark.parametrize("n", [n for n in lapack.SIZES if n > 0])
def test_solve_ratio(library, n):
    library.schedule(seed=n)
    for index, kind in enumerate(lapack.TYPES):
        nrhs = (1, 3, 33)[index % 3]
        a, right, _, x = solved(library, n, kind, index, nrhs, extra=index % 2)
        residual = right - lapack.product(a, x)
        for k in range(nrhs):
            error = lapack.norm1(residual[:, [k]])
            assert error <= 3 * lapack.norm1(a) * lapack.norm1(x[:, [k]]) * EPS, (kind, k)


@pytest.mark.parametrize("n", [1, 5, 33, 64, 95, 128, 256])
def test_the_explicit_inverse_is_as_near_as_substitution(library, n):
    """The correction uses it. The forward error is within 4 eps cond of the matrix scaled to a unit diagonal."""
    library.schedule(seed=n)
    for index, kind in enumerate(lapack.TYPES):
        a, _, wanted, x = solved(library, n, kind, index, 2, extra=0, inverse=True)
        a = a.astype(np.float64)
        scale = 1 / np.sqrt(np.diagonal(a))
        condition = np.linalg.cond(a * scale[:, None] * scale)
        error = np.linalg.norm((x - wanted) / scale[:, None]) / np.linalg.norm(wanted / scale[:, None])
        assert error <= 4 * EPS * condition, (kind, error / EPS / condition)


def inverse_info(library, n, storage):
    """Info of the explicit inverse, which up to 128 rows has a factorisation of its own."""
    b = np.ones((1, n), np.float32)
    info = library.cholesky_solve(n, 1, storage, n, b, n, True)
    assert info == 0 or (b == 1).all()
    return info


@pytest.mark.parametrize("n", [3, 17, 33, 64, 129, 256])
def test_info_names_the_leading_minor_that_fails(library, n):
    library.schedule(seed=n)
    eye = np.eye(n, dtype=np.float32)
    for k in {1, 2, n // 2 + 1, n}:
        for value in (-1.0, np.nan, -0.0, np.inf, -np.inf):
            a = eye.copy()
            a[k - 1, k - 1] = value
            storage = lapack.column_major(a, n, np.nan)
            before = storage.copy()
            assert library.cholesky(n, storage, n) == (0, k), value
            assert storage.tobytes() == before.tobytes()
            assert inverse_info(library, n, before) == k, value
    for value in (np.nan, np.inf):
        a = eye.copy()
        a[2, 1] = value  # off the diagonal: it reaches pivot 3
        assert library.cholesky(n, lapack.column_major(a, n, np.nan), n) == (0, 3), value
        assert inverse_info(library, n, lapack.column_major(a, n, np.nan)) == 3, value
    a = np.full((n, n), 4, np.float32)  # rank one in whole numbers: the second pivot is exactly 0
    assert library.cholesky(n, lapack.column_major(a, n, np.nan), n) == (0, 2)
    assert inverse_info(library, n, lapack.column_major(a, n, np.nan)) == 2


@pytest.mark.parametrize("n", [9, 128])
def test_pivots_at_the_ends_of_the_range(library, n):
    """Subnormal, tiny and huge ones, and one as small as the rounding of what it is left from."""
    library.schedule(seed=n)
    for value in (2.0**-127, 2.0**-126, 1e-30, 1e30, 2.0**126):
        a = np.eye(n, dtype=np.float32)
        a[n - 2, n - 2] = value
        b = np.ones((1, n), np.float32)
        assert library.cholesky_solve(n, 1, lapack.column_major(a, n, np.nan), n, b, n, True) == 0, value
        np.testing.assert_allclose(b[0], 1 / np.diagonal(a).astype(np.float64), rtol=4 * EPS)
    for below in range(-4, 5):  # pivots of the second row: some 2^-21, 0 or less
        a = np.eye(n, dtype=np.float32)
        a[n - 1, n - 1] = np.float32(0.99**2) + below * np.float32(2.0**-24)
        a[n - 1, n - 2] = a[n - 2, n - 1] = np.float32(0.99)
        info = inverse_info(library, n, lapack.column_major(a, n, np.nan))
        assert info == library.cholesky(n, lapack.column_major(a, n, np.nan), n)[1], below


def test_refused(library):
    a = np.zeros((1, 1), np.float32)
    assert library.cholesky(257, a, 257)[0] == -2
    assert library.cholesky(2, a, 1)[0] == -1
    assert library.cholesky(-1, a, 1)[0] == -1
    assert library.cholesky_solve(257, 1, a, 257, a, 257) == -2
    for n, nrhs, lda, ldb in ((-1, 1, 1, 1), (1, -1, 1, 1), (2, 1, 1, 2), (2, 1, 2, 1), (0, 1, 0, 1), (0, 1, 1, 0)):
        assert library.cholesky_solve(n, nrhs, a, lda, a, ldb) == -1
    assert library.cholesky_solve(0, 1, a, 1, a, 1) == library.cholesky_solve(1, 0, a, 1, a, 1) == 0
