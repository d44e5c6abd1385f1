"""Layers that have one input (query, key and value): the time that a shared covariance and inverse saves.

    python -m benchmarks.micro.bench_same_input [--seconds 5] [--json FILE]

`foreach_precondition_` computes the same in three ways: with one shared input (one layer number), with an input each,
and with concatenated gradients that are corrected as one and copied back.  Chunks have 128 units; all run on one
thread, interleaved; figures are medians of processor time.
"""

from __future__ import annotations

import time

import torch

import consistency_ops as co
from benchmarks.micro.timing import Group, interleaved, medians, one_thread, save

CASES = ((3, 768, 768, 4096), (3, 256, 256, 4096), (2, 1024, 2816, 2048))  # layers, units, outputs, rows
OPTIONS = dict(damping=0.1, scaling="trace", chunk=128)


def group(layers: int, units: int, outputs: int, rows: int) -> Group:
    x = torch.randn(rows, units)
    copies = [x.clone() for _ in range(layers)]
    grads = [torch.randn(outputs, units) for _ in range(layers)]
    work = [torch.empty_like(grad) for grad in grads]

    def restore() -> None:
        torch._foreach_copy_(work, grads)

    def concatenated() -> None:
        whole = torch.cat(work)
        co.foreach_precondition_([whole], [x], **OPTIONS)
        torch._foreach_copy_(work, list(whole.split(outputs)))

    candidates = {
        "shared": lambda: co.foreach_precondition_(work, [x] * layers, layers=[0] * layers, **OPTIONS),
        "apart": lambda: co.foreach_precondition_(work, copies, layers=[0] * layers, **OPTIONS),
        "concatenated": concatenated,
    }
    return Group(candidates, restore, ours="shared")


GROUPS = {"3 x 256 units": lambda: group(3, 256, 256, 1024)}


def measure(layers: int, units: int, outputs: int, rows: int, seconds: float) -> dict:
    found = group(layers, units, outputs, rows)
    times = interleaved(
        found.candidates, before=found.before, seconds=seconds, rounds=(9, 501), clock=time.process_time
    )
    shape = {"layers": layers, "units": units, "outputs": outputs, "rows": rows}
    return {**shape, **{f"{name}_ms": 1e3 * value for name, value in medians(times).items()}}


def main() -> None:
    arguments = one_thread(__doc__, "same_input", seconds=5.0)
    torch.manual_seed(0)
    rows = []
    for case in CASES:
        row = measure(*case, arguments.seconds)
        rows.append(row)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    save("same_input", {"clock": "process_time, one thread", "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
