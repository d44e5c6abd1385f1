"""The chunk factorisation and solve of the C API against LAPACK's own yardsticks (xCHKPO), on every instruction set.

Ratios as in LAPACK TESTING/LIN, 1-norms, computed in extended precision:

    factor  || A - L L^T || / (n eps || A ||)  <= 1        solve  || B - A X || / (|| A || || X || eps)  <= 3

LAPACK itself accepts 30; a float32 that takes a TF32 shortcut would pass 30 and fails these.  eps is the spacing at one
(2^-23, 2^-52): with half of it, a correctly rounded square root alone reaches a factor ratio of 2 at n = 1.
"""

import ctypes
import functools

import numpy as np
import pytest

from support import processes

SIZES = (0, 1, 2, 3, 5, 10, 15, 16, 17, 31, 32, 33, 50, 64, 65, 100, 128, 129, 200, 255, 256)
RIGHT_HAND_SIDES = (0, 1, 3, 16, 33, 100)
TYPES = ("diagonal", "cond-2", "cond-sqrt", "cond-0.1/eps", "cond-1e3", "cond-1e6", "graded", "tiny", "huge")
ZEROED = ("zero-first", "zero-last", "zero-middle")
PRECISIONS = {"f32": np.float32, "f64": np.float64}
INVALID, TOO_LARGE = -1, -2


@pytest.fixture(scope="module")
def library():
    import consistency_ops._C as extension

    library = ctypes.CDLL(extension.__file__)
    library.co_cpu_isa.restype = ctypes.c_char_p
    before = library.co_cpu_isa()
    yield library
    library.co_set_cpu_isa(before)


@pytest.fixture(params=[b"portable", b"avx2", b"avx512", b"avx512bf16"], ids=bytes.decode)
def isa(request, library):
    if library.co_set_cpu_isa(request.param) != 0:
        pytest.skip(f"this CPU has no {request.param.decode()}")
    return request.param


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def cholesky(library, precision, n, a, lda):
    info = ctypes.c_int32(-99)
    function = getattr(library, f"co_cholesky_{precision}")
    return function(ctypes.c_int64(n), pointer(a), ctypes.c_int64(lda), ctypes.byref(info)), info.value


def solve(library, precision, n, nrhs, factor, lda, b, ldb):
    function = getattr(library, f"co_cholesky_solve_{precision}")
    return function(
        ctypes.c_int64(n), ctypes.c_int64(nrhs), pointer(factor), ctypes.c_int64(lda), pointer(b), ctypes.c_int64(ldb)
    )


def spectrum(kind, n, eps):
    """Eigenvalues as LAPACK's slatms makes them for xCHKPO: mode 3, geometric from 1 to 1 / cond."""
    condition = {
        "cond-2": 2.0,
        "cond-sqrt": np.sqrt(0.1 / eps),
        "cond-0.1/eps": 0.1 / eps,
        "cond-1e3": 1e3,
        "cond-1e6": min(1e6, 0.1 / eps),
        "tiny": 2.0,
        "huge": 2.0,
    }.get(kind, 2.0)
    return condition ** -(np.arange(n) / max(1, n - 1))


def matrix(kind, n, dtype, rng):
    """A symmetric positive definite matrix of a type, rounded to ``dtype``, exactly symmetric."""
    information = np.finfo(dtype)
    if kind == "diagonal":
        a = np.diag(rng.uniform(0.5, 2.0, n))
    else:
        q, _ = np.linalg.qr(rng.standard_normal((n, n))) if n else (np.zeros((0, 0)), None)
        a = (q * spectrum(kind, n, information.eps)) @ q.T
    if kind == "graded":
        grade = 10.0 ** -(6 * np.arange(n) / max(1, n - 1))
        a = a * grade[:, None] * grade[None, :]
    if kind in ("tiny", "huge"):
        # As in slatb4: SMALL = SHRINK * safe minimum / precision with SHRINK = 0.25, LARGE = 1 / SMALL.
        small = 0.25 * float(information.tiny) / float(information.eps)
        a = a * (small if kind == "tiny" else 1 / small)
    a = np.tril(a) + np.tril(a, -1).T
    return a.astype(dtype)


def column_major(a, lda, fill):
    """``a`` in LAPACK's storage inside a larger array that is ``fill`` elsewhere, also above the diagonal."""
    n = len(a)
    storage = np.full((max(1, n), lda), fill, dtype=a.dtype)  # row j is column j
    for j in range(n):
        storage[j, j:n] = a[j:n, j]
    return storage


def norm1(a):
    return float(np.abs(a).sum(axis=0).max()) if a.size else 0.0


def product(a, b):
    """``a @ b`` of longdoubles with an error near 1e-19 of ``max |a| max |b|``, by four float64 products.

    The heads are multiples of 2^-20 of the largest entry, so that the sum of up to 4096 products of heads is exact."""
    result = np.zeros((a.shape[0], b.shape[1]), dtype=np.longdouble)
    if not a.size or not b.size or not a.any() or not b.any():
        return result
    halves, exponent = [], 0
    for factor in (a, b):
        _, power = np.frexp(np.abs(factor).max())
        scaled = np.ldexp(factor, -power)
        head = np.rint(np.ldexp(scaled, 20)) / np.longdouble(2**20)
        halves.append((head.astype(np.float64), (scaled - head).astype(np.float64)))
        exponent += power
    (a_head, a_tail), (b_head, b_tail) = halves
    result += a_head @ b_head
    result += a_head @ b_tail + a_tail @ b_head + a_tail @ b_tail
    return np.ldexp(result, exponent)


def lower(storage, n):
    return np.tril(storage[:n, :n].T)


def untouched(storage, before, n):
    """Whether everything but the lower triangle of the leading n x n is as it was, bit for bit."""
    mask = np.ones(storage.shape, dtype=bool)
    for j in range(n):
        mask[j, j:n] = False
    return storage[mask].tobytes() == before[mask].tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_factor_and_solve_ratios(library, isa, precision):
    dtype = PRECISIONS[precision]
    eps = float(np.finfo(dtype).eps)
    wide = np.longdouble
    worst_factor, worst_solve = 0.0, 0.0
    for n in SIZES:
        for index, kind in enumerate(TYPES):
            rng = np.random.default_rng([n, index])
            a = matrix(kind, n, dtype, rng)
            for lda in (max(1, n), n + 1, n + 13)[: 3 if index < 3 else 1]:
                storage = column_major(a, lda, np.nan)
                before = storage.copy()
                assert cholesky(library, precision, n, storage, lda) == (0, 0), (n, kind, lda)
                assert untouched(storage, before, n), (n, kind, lda)
                if n == 0:
                    continue
                factor, exact = lower(storage, n).astype(wide), a.astype(wide)
                ratio = norm1(exact - product(factor, factor.T)) / (n * eps * norm1(exact))
                assert ratio <= 1, (n, kind, lda, ratio)
                worst_factor = max(worst_factor, ratio)
            # The factor stays as it is in `storage`, NaN above the diagonal and below the matrix.
            for nrhs, extra in zip(RIGHT_HAND_SIDES, (0, 0, 5, 1, 0, 2), strict=True):
                ldb = max(1, n) + extra
                wanted = rng.uniform(-1, 1, (n, nrhs))
                scale = 1 / norm1(a) if kind == "tiny" and n else 1
                b = np.full((max(1, nrhs), ldb), np.nan, dtype=dtype)
                b[:nrhs, :n] = ((a.astype(np.float64) * scale) @ wanted).T.astype(dtype)
                right, kept, rest = b[:nrhs, :n].T.astype(wide), storage.copy(), b[:, n:].tobytes()
                assert solve(library, precision, n, nrhs, storage, lda, b, ldb) == 0
                assert storage.tobytes() == kept.tobytes() and b[:, n:].tobytes() == rest, (n, kind, nrhs)
                if nrhs == 0 or n == 0:
                    continue
                x = b[:nrhs, :n].T.astype(wide)
                residual = right - product(exact, x)
                ratio = max(norm1(residual[:, [k]]) / (norm1(exact) * norm1(x[:, [k]]) * eps) for k in range(nrhs))
                assert ratio <= 3, (n, kind, nrhs, ratio)
                worst_solve = max(worst_solve, ratio)
    print(f"{precision} {isa.decode()}: worst factor ratio {worst_factor:.3f}, worst solve ratio {worst_solve:.3f}")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ZEROED)
def test_a_zero_row_and_column_is_named(library, isa, precision, kind):
    """LAPACK types 3 to 5: info is the first, last or middle row."""
    dtype = PRECISIONS[precision]
    for n in SIZES[1:]:
        zero = {"zero-first": 0, "zero-last": n - 1, "zero-middle": n // 2}[kind]
        a = matrix("cond-2", n, dtype, np.random.default_rng(n))
        a[zero, :] = a[:, zero] = 0
        storage = column_major(a, n + 3, np.nan)
        before = storage.copy()
        assert cholesky(library, precision, n, storage, n + 3) == (0, zero + 1), n
        assert untouched(storage, before, n), n
        # The columns of the whole blocks of 16 before it are factored, the others are as they were.
        done = zero // 16 * 16
        factor = np.tril(lower(storage, n))[:, :done].astype(np.longdouble)
        leading = a[:done, :done].astype(np.longdouble)
        assert np.array_equal(lower(storage, n)[:, done:], lower(before, n)[:, done:]), n
        assert norm1(leading - product(factor[:done], factor[:done].T)) <= n * float(np.finfo(dtype).eps) * norm1(
            leading
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_info_names_the_leading_minor_that_fails(library, isa, precision):
    """NaN, Inf, indefinite and rank-deficient matrices."""
    dtype = PRECISIONS[precision]
    for n in (3, 17, 33, 64, 129, 256):
        eye = np.eye(n, dtype=dtype)
        for k in {1, 2, n // 2 + 1, n}:
            cases = {"negative": -1.0, "nan": np.nan, "minus zero": -0.0, "-inf": -np.inf}
            for name, value in cases.items():
                a = eye.copy()
                a[k - 1, k - 1] = value
                assert cholesky(library, precision, n, column_major(a, n, np.nan), n) == (0, k), (n, k, name)
        for value in (np.nan, np.inf):
            a = eye.copy()
            a[2, 1] = value  # off the diagonal: it reaches pivot 3
            assert cholesky(library, precision, n, column_major(a, n, np.nan), n) == (0, 3), (n, value)
        a = eye.copy()
        a[0, 0] = np.inf  # L[0, 0] = inf may pass, but no NaN of it may go unseen
        status, info = cholesky(library, precision, n, column_major(a, n, np.nan), n)
        assert status == 0
        assert info >= 0
        assert cholesky(library, precision, n, column_major(eye - 5 * eye, n, np.nan), n) == (0, 1)
        assert cholesky(library, precision, n, column_major(0 * eye, n, np.nan), n) == (0, 1)
        # Rank one in whole numbers: the second pivot is exactly 4 - 2 * 2 = 0.
        a = np.full((n, n), 4, dtype=dtype)
        assert cholesky(library, precision, n, column_major(a, n, np.nan), n) == (0, 2), n


@pytest.mark.parametrize("precision", PRECISIONS)
def test_too_large_and_invalid_arguments(library, precision):
    dtype = PRECISIONS[precision]
    a = np.eye(257, 260, dtype=dtype)
    b = np.ones((4, 260), dtype=dtype)
    kept = a.copy(), b.copy()
    assert cholesky(library, precision, 257, a, 260)[0] == TOO_LARGE
    assert solve(library, precision, 257, 1, a, 260, b, 260) == TOO_LARGE
    assert cholesky(library, precision, -1, a, 260)[0] == INVALID
    assert cholesky(library, precision, 5, a, 4)[0] == INVALID
    assert cholesky(library, precision, 0, a, 0)[0] == INVALID
    for n, nrhs, lda, ldb in ((-1, 1, 9, 9), (5, -1, 9, 9), (5, 1, 4, 9), (5, 1, 9, 4), (0, 1, 0, 1), (0, 1, 1, 0)):
        assert solve(library, precision, n, nrhs, a, lda, b, ldb) == INVALID, (n, nrhs, lda, ldb)
    assert np.array_equal(a, kept[0])
    assert np.array_equal(b, kept[1])
    null, five = ctypes.c_void_p(), ctypes.c_int64(5)
    info = ctypes.c_int32()
    function = getattr(library, f"co_cholesky_{precision}")
    assert function(five, null, five, ctypes.byref(info)) == INVALID
    assert function(five, pointer(a), five, null) == INVALID
    function = getattr(library, f"co_cholesky_solve_{precision}")
    assert function(five, five, null, five, pointer(b), five) == INVALID
    assert function(five, five, pointer(a), five, null, five) == INVALID


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_may_call_at_the_same_time(library, precision):
    dtype = PRECISIONS[precision]
    problems = [matrix("cond-1e3", n, dtype, np.random.default_rng(n)) for n in (33, 64, 129, 256)] * 8

    def factor(a):
        storage = column_major(a, len(a), 0)
        assert cholesky(library, precision, len(a), storage, len(a)) == (0, 0)
        return storage.tobytes()

    want = [factor(a) for a in problems]

    def share(worker):
        return [factor(a) for a in problems[worker::4]]

    found = processes.in_threads(*(functools.partial(share, worker) for worker in range(4)))
    assert found == [want[worker::4] for worker in range(4)]
