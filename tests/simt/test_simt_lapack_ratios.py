"""The factorisation of the CUDA kernels, run on the CPU, against LAPACK's yardstick (see test_lapack_ratios.py).

|| A - L L^T || / (n eps || A ||)  <= 1
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
    for value in (np.nan, np.inf):
        a = eye.copy()
        a[2, 1] = value  # off the diagonal: it reaches pivot 3
        assert library.cholesky(n, lapack.column_major(a, n, np.nan), n) == (0, 3), value
    a = np.full((n, n), 4, np.float32)  # rank one in whole numbers: the second pivot is exactly 0
    assert library.cholesky(n, lapack.column_major(a, n, np.nan), n) == (0, 2)


def test_refused(library):
    a = np.zeros((1, 1), np.float32)
    assert library.cholesky(257, a, 257)[0] == -2
    assert library.cholesky(2, a, 1)[0] == -1
    assert library.cholesky(-1, a, 1)[0] == -1
