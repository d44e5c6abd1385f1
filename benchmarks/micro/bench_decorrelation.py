"""Pixel-wise decorrelation of a convolution's gradient (im2col, FFT) against the correction between channels.

    python -m benchmarks.micro.bench_decorrelation [--seconds 3] [--json FILE]

All run on one thread in float32, interleaved; figures are medians of processor time.  The ratio is to `co.precondition`
with chunks of 128 channels and at most the same 4096 rows.  The FFT uses all images.
"""

from __future__ import annotations

import time

import torch

import consistency_ops as co
from benchmarks.micro.timing import Group, interleaved, medians, one_thread, save
from consistency_ops.experimental import decorrelate_fft, decorrelate_im2col

ROWS = 4096
LAYERS = (  # batch, in, out, image, kernel
    (64, 3, 32, 32, 5),
    (64, 32, 32, 16, 5),
    (64, 32, 64, 16, 3),
    (64, 64, 64, 16, 3),
    (64, 128, 128, 8, 3),
)


def group(batch: int, inputs: int, outputs: int, image: int, kernel: int) -> Group:
    x, grad = torch.randn(batch, inputs, image, image), torch.randn(outputs, inputs, kernel, kernel)
    padding = kernel // 2
    return Group(
        {
            "channels": lambda: co.precondition(grad, x, damping=0.1, chunk=128, max_rows=ROWS),
            "im2col": lambda: decorrelate_im2col(grad, x, damping=0.1, padding=padding, max_rows=ROWS),
            "fft": lambda: decorrelate_fft(grad, x, damping=0.1, padding=padding),
        },
        ours="channels",
    )


GROUPS = {"64 channels": lambda: group(16, 64, 64, 16, 3)}


def measure(batch: int, inputs: int, outputs: int, image: int, kernel: int, seconds: float) -> dict:
    candidates = group(batch, inputs, outputs, image, kernel).candidates
    median = medians(interleaved(candidates, seconds=seconds, rounds=(5, 501), clock=time.process_time))
    return {
        "layer": f"{batch} x {inputs} x {image} x {image}, {outputs} kernels {kernel}x{kernel}",
        **{f"{name}_ms": value * 1e3 for name, value in median.items()},
        **{f"{name}_ratio": median[name] / median["channels"] for name in ("im2col", "fft")},
    }


def main() -> None:
    arguments = one_thread(__doc__, "decorrelation", seconds=3.0)
    print(f"{'layer':<42} channels ms  im2col ms     fft ms   ratios")
    rows = []
    for layer in LAYERS:
        row = measure(*layer, arguments.seconds)
        rows.append(row)
        print(
            f"{row['layer']:<42} {row['channels_ms']:>11.2f} {row['im2col_ms']:>10.2f} {row['fft_ms']:>10.2f}   "
            f"{row['im2col_ratio']:.1f} {row['fft_ratio']:.1f}"
        )
    save("decorrelation", {"clock": "process_time, one thread, busy machine", "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
