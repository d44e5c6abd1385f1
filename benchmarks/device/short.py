"""Runs every CUDA kernel once or twice on small shapes, for compute-sanitizer: python -m benchmarks.device.short."""

from __future__ import annotations

import sys

import torch

import consistency_ops as co
from consistency_ops import ops
from consistency_ops.engine.capture_states import STATE_SIZE


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grads = [normal(40, 300, dtype=dtype), normal(9, 33, dtype=dtype), normal(8, 24, 3, 3, dtype=dtype)]
        inputs = [normal(600, 300, dtype=dtype), normal(50, 33, dtype=dtype), normal(2, 24, 9, 7, dtype=dtype)]
        biases = [normal(40, dtype=dtype), None, normal(8, dtype=dtype)]
        for scaling, chunk in (("absolute", 128), ("trace", 64), ("trace", 200)):
            co.foreach_precondition_(grads, inputs, bias_grads=biases, scaling=scaling, chunk=chunk)
        covariances = ops.foreach_covariance(inputs, grads=grads)
        inverses, info, _ = ops.foreach_inverse(covariances, units=[300, 33, 24], scaling="trace")
        ops.foreach_apply_(grads, inverses, info)
        ops.foreach_correct_(grads, covariances, scaling="trace")
        co.foreach_precondition_([grads[0], grads[0].clone()], [inputs[0]] * 2, layers=[0, 0])
        x = inputs[2].requires_grad_()
        running, count = torch.zeros(24, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        for layout in (torch.contiguous_format, torch.channels_last):
            y = co.modulus(x.contiguous(memory_format=layout))
            co.batch_rms_norm(y, running, training=True, num_batches=count).sum().backward()
        rows = torch.zeros(100, 24, device="cuda")
        state = torch.zeros(1, STATE_SIZE, dtype=torch.int64, device="cuda")
        for _ in range(4):  # thins the rows, then forgets those of one call
            torch.ops.consistency_ops.capture_rows_(rows, state, x, 0, 1, 0)
            torch.ops.consistency_ops.capture_mark_(rows, state, 0, bool(state[0, 4] > 0))
    large = normal(512, 1024), normal(700, 1024)  # enough rows for several thread blocks per chunk
    co.foreach_precondition_([large[0]], [large[1]], chunk=256, scaling="trace")
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
