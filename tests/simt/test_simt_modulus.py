"""The CUDA modulus, run on the CPU: every bit of the result, for every type, length and alignment."""

import shutil

import numpy as np
import pytest
import simt_library as simt

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
BITS = {simt.FLOAT32: np.uint32, simt.FLOAT64: np.uint64, simt.BFLOAT16: np.uint16, simt.FLOAT16: np.uint16}


@pytest.fixture(scope="module")
def library():
    return simt.load()


def numbers(dtype, count, rng):
    """The bits of `count` random numbers, special ones among them."""
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan, 1e-40, -1e-40, 6e-8, -6e-8]
    values = np.concatenate([special, rng.standard_normal(max(0, count - len(special)))])[:count]
    rng.shuffle(values)
    if dtype == simt.FLOAT64:
        return values.view(np.uint64)
    return simt.encode(values.astype(np.float32), dtype).view(BITS[dtype])


def decode(bits, dtype):
    if dtype == simt.FLOAT64:
        return bits.view(np.float64)
    return bits.view(np.float32) if dtype == simt.FLOAT32 else simt.decode(bits, dtype)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 7), (1, 9000), (3, 133), (5, 64), (2, 4097)])
@pytest.mark.parametrize("dtype", BITS, ids=["float32", "float64", "bfloat16", "float16"])
def test_forward_and_backward(library, dtype, rows, length, shift):
    rng = np.random.default_rng(rows * length + shift)
    count = rows * length
    # The elements begin `shift` elements into buffers that end with them.
    x = np.concatenate([np.zeros(shift, BITS[dtype]), numbers(dtype, count, rng)])
    y, grad_x = np.zeros_like(x), np.zeros_like(x)
    grad = np.concatenate([np.zeros(shift, BITS[dtype]), numbers(dtype, count, rng)])
    signs = np.full((rows, (length + 7) // 8), 0xFF, np.uint8)
    at = shift * x.itemsize
    negative = decode(x[shift:], dtype).reshape(rows, length) < 0
    top = BITS[dtype](1) << BITS[dtype](8 * x.itemsize - 1)
    for seed in range(3):
        library.schedule(seed=seed)
        library.modulus(x.ctypes.data + at, y.ctypes.data + at, signs.ctypes.data, rows, length, dtype)
        assert np.array_equal(y[shift:], x[shift:] & ~top)
        assert np.array_equal(np.unpackbits(signs, axis=1, bitorder="little")[:, :length], negative)
        assert not np.unpackbits(signs, axis=1, bitorder="little")[:, length:].any()
        library.modulus_backward(grad.ctypes.data + at, signs.ctypes.data, grad_x.ctypes.data + at, rows, length, dtype)
        want = np.where(negative.ravel(), grad[shift:] ^ top, grad[shift:])
        assert np.array_equal(grad_x[shift:], want)


def test_in_place_and_without_signs(library):
    x = numbers(simt.FLOAT32, 1001, np.random.default_rng(0))
    want = x & np.uint32(0x7FFFFFFF)
    library.schedule()
    library.modulus(x.ctypes.data, x.ctypes.data, None, 1, 1001, simt.FLOAT32)
    assert np.array_equal(x, want)


def test_nothing_to_do(library):
    library.modulus(0, 0, None, 0, 5, simt.FLOAT32)
    library.modulus_backward(0, 0, 0, 5, 0, simt.FLOAT32)


def test_refused(library):
    with pytest.raises(RuntimeError, match="status 1"):
        library.modulus(0, 0, None, 1, -1, simt.FLOAT32)
