"""The CUDA batch RMS normalisation, run on the CPU, against float64."""

import shutil

import numpy as np
import pytest
import simt_library as simt

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
# (N, C, pixels): whole vectors and not, one part and several, one channel and more than a CTA takes
SHAPES = [(5, 3, 1), (2, 3, 49), (3, 64, 16), (1, 2, 40_000), (700, 8, 1), (2, 300, 4), (6, 1, 5), (1, 5, 8)]


@pytest.fixture(scope="module")
def library():
    return simt.load()


def view(array, channels_last):
    """Return the view of a contiguous array (N, C, pixels) or (N, pixels, C)."""
    if channels_last:
        n, pixels, channels = array.shape
        return simt.ChannelView(n, channels, pixels, pixels * channels, 1, channels)
    n, channels, pixels = array.shape
    return simt.ChannelView(n, channels, pixels, channels * pixels, pixels, 1)


def address(array):
    return None if array is None else array.ctypes.data


def denominator(library, x, channels_last, dtype, running, count, decay=0.3, eps=1e-2):
    """Return D; `running` and `count` are updated."""
    d = np.full(len(running), np.nan, np.float32)
    shape = view(x, channels_last) if x is not None else simt.ChannelView(0, len(running), 0, 0, 0, 1)
    params = simt.BatchRmsNorm(
        address(x),
        shape,
        dtype,
        address(running),
        simt.FLOAT32,
        address(count),
        address(d),
        simt.FLOAT32,
        decay,
        eps,
    )
    library.batch_rms_norm_denominator(params)
    return d


def expected(x, running, count, decay=0.3, eps=1e-2):
    """Return (v, D) in float64 for x (N, C, pixels) or None."""
    v = running.astype(np.float64)
    if x is not None:
        v = decay * v + (1 - decay) * (x.astype(np.float64) ** 2).mean(axis=(0, 2))
    correction = 1 - decay**count if count else 1
    return v, np.sqrt(v / correction + eps * (v.max() + 1e-6))


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("dtype", [simt.FLOAT32, simt.BFLOAT16, simt.FLOAT16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_and_division(library, shape, dtype, channels_last):
    rng = np.random.default_rng(sum(shape))
    values = rng.standard_normal(shape) * rng.uniform(0.1, 3, (1, shape[1], 1))
    x = simt.encode(values, dtype)
    values = simt.decode(x, dtype).astype(np.float64)
    if channels_last:
        x = np.ascontiguousarray(x.transpose(0, 2, 1))
    results = []
    for seed in range(2):
        library.schedule(seed=seed, resident=1 + 2 * seed)
        running, count = np.full(shape[1], 0.7, np.float32), np.array([4], np.int64)
        d = denominator(library, x, channels_last, dtype, running, count)
        y = np.zeros_like(x)
        divide = simt.ChannelDivide(
            address(x), view(x, channels_last), address(y), view(y, channels_last), dtype, address(d)
        )
        library.channel_divide(divide)
        results.append((running.tobytes(), d.tobytes(), y.tobytes()))
        assert count[0] == 5
    assert results[0] == results[1], "the result depends on the schedule"
    v, want = expected(values, np.full(shape[1], 0.7, np.float32), 5)
    np.testing.assert_allclose(running, v, rtol=2e-6)
    np.testing.assert_allclose(d, want, rtol=2e-6)
    got = simt.decode(y, dtype).astype(np.float64)
    got = got.transpose(0, 2, 1) if channels_last else got
    rounding = {simt.FLOAT32: 2.0**-23, simt.BFLOAT16: 2.0**-8, simt.FLOAT16: 2.0**-11}[dtype]
    np.testing.assert_allclose(got, values / d.astype(np.float64)[:, None], rtol=1.1 * rounding, atol=1e-7)


def test_evaluation_repeats_the_last_training_batch(library):
    x = np.random.default_rng(0).standard_normal((4, 6, 5)).astype(np.float32)
    running, count = np.zeros(6, np.float32), np.zeros(1, np.int64)
    library.schedule()
    trained = denominator(library, x, False, simt.FLOAT32, running, count)
    again = denominator(library, None, False, simt.FLOAT32, running, count)
    assert np.array_equal(trained, again)
    assert count[0] == 1
    np.testing.assert_allclose(again, expected(None, running, 1)[1], rtol=1e-6)


def test_without_a_counter_nothing_is_corrected(library):
    running = np.array([0.5, 2.0], np.float32)
    library.schedule()
    np.testing.assert_allclose(
        denominator(library, None, False, simt.FLOAT32, running, None), expected(None, running, 0)[1], rtol=1e-6
    )


def test_nan_reaches_every_denominator(library):
    """The maximum over channels is NaN if one of them is, as on the CPU."""
    x = np.ones((2, 40, 3), np.float32)
    x[1, 37, 2] = np.nan
    running = np.zeros(40, np.float32)
    for seed in range(3):
        library.schedule(seed=seed)
        assert np.isnan(denominator(library, x, False, simt.FLOAT32, running.copy(), None)).all()


def test_unaligned_and_padded_maps(library):
    """A map that begins 4 bytes after a multiple of 16, in images with a gap between them."""
    buffer = np.random.default_rng(0).standard_normal((3, 1 + 4 * 8 + 3)).astype(np.float32)
    values = buffer[:, 1:33].reshape(3, 4, 8)
    y = np.zeros((3, 4, 8), np.float32)
    shape = simt.ChannelView(3, 4, 8, 36, 8, 1)
    running, d = np.zeros(4, np.float32), np.zeros(4, np.float32)
    library.schedule()
    params = simt.BatchRmsNorm(
        buffer.ctypes.data + 4, shape, simt.FLOAT32, address(running), 0, None, address(d), 0, 0.0, 1e-2
    )
    library.batch_rms_norm_denominator(params)
    np.testing.assert_allclose(running, (values.astype(np.float64) ** 2).mean(axis=(0, 2)), rtol=2e-6)
    library.channel_divide(
        simt.ChannelDivide(buffer.ctypes.data + 4, shape, address(y), view(y, False), simt.FLOAT32, address(d))
    )
    np.testing.assert_allclose(y, values / d[:, None], rtol=2e-7)


def test_more_channels_than_a_grid_has_rows(tmp_path):
    """grid.y ends at 65,535 CTAs, too many to run here: the same loop, in a copy whose limit is 3."""
    for part in ("csrc", "tests/simt"):
        shutil.copytree(simt.ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "csrc" / "cuda" / "batch_rms_norm.cu"
    text = source.read_text()
    assert text.count("kMaxGridY = 65535;") == 1
    source.write_text(text.replace("kMaxGridY = 65535;", "kMaxGridY = 3;"))
    library = simt.Library(simt.build("plain", tmp_path))
    for channels, channels_last in ((3, False), (8, False), (96, True), (500, True)):
        shape = (2, 5, channels) if channels_last else (2, channels, 5)
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        running = np.zeros(channels, np.float32)
        denominator(library, x, channels_last, simt.FLOAT32, running, None, decay=0.0)
        np.testing.assert_allclose(running, (x**2).mean(axis=(0, 1 if channels_last else 2)), rtol=1e-6)


def test_refused(library):
    x = np.zeros((1, 1, 1))
    with pytest.raises(RuntimeError, match="status 1"):
        denominator(library, x, False, simt.FLOAT64, np.zeros(1, np.float32), None)
    with pytest.raises(RuntimeError, match="status 1"):
        denominator(library, None, False, simt.FLOAT32, np.zeros(1, np.float32), None, decay=1.0)
