"""Row capture by the CUDA kernel, run on the CPU: the rows and the state of the CPU operator, bit for bit."""

import shutil

import numpy as np
import pytest
import simt_library as simt

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
STATE, PAUSED, ARRIVED = 11, 8, 10
STORAGE = {simt.FLOAT32: np.float32, simt.FLOAT64: np.float64, simt.BFLOAT16: np.uint16, simt.FLOAT16: np.uint16}
WIDER = {
    simt.FLOAT32: (simt.FLOAT32, simt.FLOAT64),
    simt.FLOAT64: (simt.FLOAT64,),
    simt.BFLOAT16: (simt.BFLOAT16, simt.FLOAT32, simt.FLOAT64),
    simt.FLOAT16: (simt.FLOAT16, simt.FLOAT32, simt.FLOAT64),
}


@pytest.fixture(scope="module")
def library():
    return simt.load()


class Buffer:
    """Rows and state, as one of the two implementations leaves them."""

    def __init__(self, capacity, units, dtype):
        self.dtype = dtype
        self.rows = np.full((capacity, units), 7, STORAGE[dtype])
        self.state = np.zeros(STATE, np.int64)

    def problem(self, x, x_dtype, unit_axis, seed=5, layer=3, in_backward=False, marks=False):
        """Describe the capture of numpy ``x``, whose axes other than ``unit_axis`` are rows."""
        axes = [axis for axis in range(x.ndim) if axis != unit_axis]
        pad = 4 - len(axes)
        size = [1] * pad + [x.shape[axis] for axis in axes]
        stride = [0] * pad + [x.strides[axis] // x.itemsize for axis in axes]
        return simt.CaptureProblem(
            x.ctypes.data,
            (simt.ctypes.c_int64 * 4)(*size),
            (simt.ctypes.c_int64 * 4)(*stride),
            x.strides[unit_axis] // x.itemsize,
            x.shape[unit_axis],
            x_dtype,
            self.dtype,
            self.rows.ctypes.data,
            len(self.rows),
            self.state.ctypes.data,
            seed,
            layer,
            in_backward,
            marks,
        )

    def same_as(self, other):
        return self.rows.tobytes() == other.rows.tobytes() and self.state.tolist() == other.state.tolist()


def numbers(shape, dtype, rng):
    values = rng.standard_normal(shape)
    return values if dtype == simt.FLOAT64 else simt.encode(values, dtype)


def both(library, capacity, units, dtype, steps, seed=5):
    """Applies ``steps`` to a CPU buffer and to a CUDA one; they must agree after each."""
    want, got = Buffer(capacity, units, dtype), Buffer(capacity, units, dtype)
    for number, step in enumerate(steps):
        for buffer, cpu in ((want, True), (got, False)):
            library.schedule(seed=number + seed, order=number % 3, resident=1 + number % 3)
            step(buffer, cpu)
        assert got.same_as(want), (number, got.state, want.state)
    return got


def rows_of(library, x, dtype, unit_axis, seed=5, marks=False):
    return lambda buffer, cpu: library.capture_rows(buffer.problem(x, dtype, unit_axis, seed, marks=marks), cpu)


def mark_of(library, x, restart):
    return lambda buffer, cpu: library.capture_mark(buffer.problem(x, buffer.dtype, 1), restart, cpu)


@pytest.mark.parametrize("dtype", STORAGE, ids=["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("capacity", [1, 30, 5000])
def test_layouts_and_types(library, dtype, capacity):
    rng = np.random.default_rng(capacity)
    nchw = numbers((3, 40, 5, 4), dtype, rng)
    wide = numbers((7, 11, 2 * 136), dtype, rng)
    samples = {
        "rows": (numbers((75, 136), dtype, rng), 1),
        "no whole vectors": (numbers((75, 33), dtype, rng), 1),
        "columns": (numbers((33, 75), dtype, rng), 0),
        "nchw": (nchw, 1),
        "nhwc": (np.ascontiguousarray(nchw.transpose(0, 2, 3, 1)), 3),
        "every other unit": (wide[..., ::2], 2),
        "every other row": (wide[::2, :, :136], 2),
        "backwards": (wide[::-1, :, :136], 2),
        "shifted": (wide[..., 1:137], 2),
        "four row dimensions": (numbers((2, 3, 34, 2, 2), dtype, rng)[:, ::-1], 2),
        "one unit": (numbers((90, 1), dtype, rng), 1),
    }
    for name, (x, axis) in samples.items():
        for to in WIDER[dtype]:
            buffer = both(library, capacity, x.shape[axis], to, [rows_of(library, x, dtype, axis)])
            rows = x.size // x.shape[axis]
            assert buffer.state[0] == rows if capacity == 5000 else 0 <= buffer.state[0] <= capacity, name
            assert buffer.state[1] == rows and buffer.state[ARRIVED] == 0, name


@pytest.mark.parametrize("capacity", [1, 8, 33, 100, 200])
@pytest.mark.parametrize("layout", ["rows", "nchw"])
def test_pooled_calls_thin_the_rows(library, layout, capacity):
    """Several calls, of which later ones find the buffer full, once or several times over."""
    rng = np.random.default_rng(capacity)
    steps = []
    for images in (1, 3, 1, 12, 2):
        x = numbers((images, 70, 5, 3), simt.FLOAT32, rng)
        if layout == "rows":
            x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(-1, 70)
        steps += [rows_of(library, x, simt.FLOAT32, 1), mark_of(library, x, False)]
    buffer = both(library, capacity, 70, simt.FLOAT32, steps)
    assert buffer.state[5] > 0  # something was thinned out
    assert buffer.state[1] == 19 * 15


@pytest.mark.parametrize("capacity", [8, 100, 200])
def test_rows_bring_the_mark_of_the_backward_pass_before_them(library, capacity):
    """Without a launch of its own, and with the same state and rows."""
    rng = np.random.default_rng(capacity)
    inputs = [numbers((count, 70), simt.FLOAT32, rng) for count in (15, 45, 60, 1, 90)]
    steps, shorter = [], []
    for number, x in enumerate(inputs):
        marks = number % 3 != 1
        if marks and number:
            steps.append(mark_of(library, x, False))
        steps.append(rows_of(library, x, simt.FLOAT32, 1))
        shorter.append(rows_of(library, x, simt.FLOAT32, 1, marks=marks))
    assert both(library, capacity, 70, simt.FLOAT32, shorter).same_as(both(library, capacity, 70, simt.FLOAT32, steps))


@pytest.mark.parametrize("marked", [1, 5, 70, 130])
def test_a_restart_moves_the_rows_behind_the_mark(library, marked):
    rng = np.random.default_rng(marked)
    first, second = numbers((marked, 40), simt.FLOAT32, rng), numbers((150, 40), simt.FLOAT32, rng)
    steps = [rows_of(library, first, simt.FLOAT32, 1), mark_of(library, first, False)]
    steps += [rows_of(library, second, simt.FLOAT32, 1), mark_of(library, first, True), mark_of(library, first, True)]
    for some in (steps[:4], steps):  # the last one has no rows behind the mark
        buffer = both(library, 400, 40, simt.FLOAT32, some)
        assert buffer.state[0] == 150 and buffer.rows[:150].tobytes() == second.tobytes()


def test_paused_and_empty(library):
    x = np.ones((6, 4), np.float32)

    def pause(buffer, cpu):
        buffer.state[PAUSED] = 1

    steps = [rows_of(library, x[:0], simt.FLOAT32, 1), rows_of(library, x, simt.FLOAT32, 1), pause]
    buffer = both(library, 8, 4, simt.FLOAT32, [*steps, rows_of(library, x, simt.FLOAT32, 1)])
    assert buffer.state[0] == 6


def test_a_recomputation_in_the_backward_pass_counts_only_without_its_forward_pass(library):
    x = np.ones((6, 4), np.float32)

    def again(buffer, cpu):
        library.capture_rows(buffer.problem(x, simt.FLOAT32, 1, in_backward=True), cpu)

    assert both(library, 20, 4, simt.FLOAT32, [again, again]).state[0] == 12
    assert both(library, 20, 4, simt.FLOAT32, [rows_of(library, x, simt.FLOAT32, 1), again]).state[0] == 6


def test_many_tiles(library):
    """More than one tile of rows and of units, in every order of the blocks."""
    x = numbers((700, 300), simt.BFLOAT16, np.random.default_rng(0))
    both(library, 650, 300, simt.FLOAT32, [rows_of(library, x, simt.BFLOAT16, 1)])
    both(library, 350, 700, simt.FLOAT32, [rows_of(library, x, simt.BFLOAT16, 0)])


def test_more_tiles_than_ctas(library):
    """A CTA takes several tiles of 64 rows, whose offsets are in the same shared memory."""
    x = numbers((64 * 2100, 1), simt.FLOAT32, np.random.default_rng(0))
    both(library, len(x), 1, simt.FLOAT32, [rows_of(library, x, simt.FLOAT32, 1)])
    assert library.stats().ctas == 2048


def test_refused(library):
    x = np.ones((6, 4))
    with pytest.raises(RuntimeError, match="status 1"):
        library.capture_rows(Buffer(8, 4, simt.FLOAT32).problem(x, simt.FLOAT64, 1))
    problem = Buffer(8, 4, simt.FLOAT64).problem(x, simt.FLOAT64, 1)
    problem.capacity = 0
    with pytest.raises(RuntimeError, match="status 1"):
        library.capture_rows(problem)
