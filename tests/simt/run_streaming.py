"""Runs the kernels that are bound by memory once on aligned arrays, for the counts of test_simt_accesses.py.

python run_streaming.py LIBRARY
"""

import sys
from pathlib import Path

import numpy as np
import simt_library as simt


def aligned(*shape: int) -> np.ndarray:
    """float32 numbers that begin on 128 bytes."""
    count = int(np.prod(shape))
    flat = np.arange(count + 32, dtype=np.float32)
    first = -flat.ctypes.data % 128 // 4
    return flat[first : first + count].reshape(shape)


def main() -> None:
    library = simt.Library(Path(sys.argv[1]))
    library.schedule(resident=1)
    x, y, signs = aligned(1, 8192), aligned(1, 8192), aligned(256).view(np.uint8)
    library.modulus(x.ctypes.data, y.ctypes.data, signs.ctypes.data, 1, 8192, simt.FLOAT32)
    library.modulus_backward(x.ctypes.data, signs.ctypes.data, y.ctypes.data, 1, 8192, simt.FLOAT32)

    images, channels, pixels = 4, 64, 128
    for size, stride, unit_stride in (
        ((1, 1, 1, images * pixels), (0, 0, 0, channels), 1),  # units are fast
        ((1, 1, images, pixels), (0, 0, channels * pixels, 1), pixels),  # NCHW
    ):
        maps, rows, state = (
            aligned(images, channels, pixels),
            aligned(images * pixels, channels),
            np.zeros(10, np.int64),
        )
        problem = simt.CaptureProblem(x=maps.ctypes.data, unit_stride=unit_stride, units=channels, seed=1)
        problem.row_size, problem.row_stride = size, stride
        problem.rows, problem.capacity, problem.state = rows.ctypes.data, len(rows), state.ctypes.data
        library.capture_rows(problem)

    for view in (
        simt.ChannelView(images, channels, pixels, channels * pixels, pixels, 1),
        simt.ChannelView(images, channels, pixels, channels * pixels, 1, channels),
    ):
        maps, running, denominator = aligned(images, channels, pixels), aligned(channels), aligned(channels)
        params = simt.BatchRmsNorm(x=maps.ctypes.data, view=view, decay=0.5, eps=1e-2)
        params.running_ms, params.denominator = running.ctypes.data, denominator.ctypes.data
        library.batch_rms_norm_denominator(params)
        divide = simt.ChannelDivide(x=maps.ctypes.data, x_view=view, y=maps.ctypes.data, y_view=view)
        divide.denominator = denominator.ctypes.data
        library.channel_divide(divide)


if __name__ == "__main__":
    main()
