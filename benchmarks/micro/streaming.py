"""The memory-bound operators for bench_cuda.py: each call, and the bytes that it must move.

The target is 90 % of the bandwidth that a large copy reaches in the same run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from consistency_ops.engine.capture_states import STATE_SIZE

SHAPE = (64, 256, 56, 56)  # an early map of ResNet-50, several times the L2 of any device
TARGET = 0.9


def calls(
    device: str, dtype: torch.dtype, channels_last: bool, shape: tuple[int, ...] = SHAPE
) -> dict[str, tuple[Callable[[], object], int]]:
    """Return {name: (call, bytes)}.  The row capture takes every row, so that its bytes are those of a copy."""
    ops = torch.ops.consistency_ops
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout)
    channels, size = shape[1], x.numel() * x.itemsize
    signs = ops.modulus_forward(x)[1]
    running = torch.ones(channels, device=device)
    denominator = torch.ones(channels, device=device)
    rows = torch.empty(x.numel() // channels, channels, device=device, dtype=dtype)
    state = torch.zeros(1, STATE_SIZE, dtype=torch.int64, device=device)

    def capture() -> None:
        state.zero_()
        ops.capture_rows_(rows, state, x, 0, 1, 0)

    return {
        "modulus": (lambda: ops.modulus_forward(x), 2 * size + x.numel() // 8),
        "modulus, backward": (lambda: ops.modulus_backward(x, signs), 2 * size + x.numel() // 8),
        "RMS of channels": (lambda: ops.batch_rms_norm_denominator_(x, running, None, 0.9, 1e-2), size),
        "division by RMS": (lambda: ops.batch_rms_norm_divide(x, denominator), 2 * size),
        "row capture": (capture, 2 * size),
    }
