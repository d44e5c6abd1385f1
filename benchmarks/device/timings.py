"""First timings of ours alone, on the six workloads, one line of JSON each: no peer can end them.

    python -m benchmarks.device.timings [--workloads i ii] [--seconds 0.5] [--once]

Replays of a CUDA graph of the one launch, cold and warm as in bench_cuda, and its three stages apart, which tell Gram,
factor and correction.  `--once` runs each twice without timing, for a profiler.  The smallest workloads come first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

import torch

import consistency_ops as co
from benchmarks.micro.bench_cuda import (
    DAMPING,
    FLUSH_BYTES,
    SETTINGS,
    Setting,
    copy_bandwidth,
    event_medians,
    graphed,
    moved_bytes,
)
from benchmarks.micro.workloads import WORKLOADS
from consistency_ops import ops


def measure(setting: Setting, seconds: float, once: bool) -> dict:
    workload = WORKLOADS[setting.workload]
    workload = dataclasses.replace(workload, layers=workload.layers * setting.repeat)
    pristine, inputs = ([t.cuda() for t in tensors] for tensors in workload.tensors(setting.rows))
    grads = [grad.clone() for grad in pristine]
    flush = torch.empty(FLUSH_BYTES // 4, device="cuda")
    options = {"damping": DAMPING, "chunk": setting.chunk}

    def restore() -> None:
        torch._foreach_copy_(grads, pristine)

    def cold() -> None:
        restore()
        flush.fill_(1.0)

    def ours() -> None:
        co.foreach_precondition_(grads, inputs, **options)

    covariances = ops.foreach_covariance(inputs, grads=grads, chunk=setting.chunk)
    units = [layer.units for layer in workload.layers]
    inverses, info, _ = ops.foreach_inverse(covariances, units=units, **options)
    stages = {
        "covariance": lambda: ops.foreach_covariance(inputs, grads=grads, chunk=setting.chunk),
        "inverse": lambda: ops.foreach_inverse(covariances, units=units, **options),
        "apply": lambda: ops.foreach_apply_(grads, inverses, info, chunk=setting.chunk),
    }
    if once:
        for run in (ours, ours, *stages.values()):
            run()
        torch.cuda.synchronize()
        return {}
    found: dict = {"failed": {}}
    candidates = {}
    for name, run in {"ours": ours, **stages}.items():
        try:
            candidates[name] = graphed(run)
        except RuntimeError as error:
            found["failed"][name] = str(error)[:300]
    for name, before in (("cold_us", cold), ("warm_us", restore)):
        found[name] = event_medians(candidates, before, seconds)
    moved = moved_bytes(workload.layers, setting.rows, workload.inputs.itemsize, workload.grads.itemsize)
    return {**found, "bytes": moved, "target_us": setting.target_us}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seconds", type=float, default=0.5, help="of timed work, cold and warm each")
    parser.add_argument("--once", action="store_true", help="no timing: for a profiler")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was measured")
    co.set_backend("native")
    if not arguments.once:
        print(json.dumps({"copy_bytes_per_second": copy_bandwidth()}), flush=True)
    for number in arguments.workloads:
        try:
            found = measure(SETTINGS[number], arguments.seconds, arguments.once)
        except RuntimeError as error:
            found = {"error": str(error)[:300]}
        print(json.dumps({"workload": number, **found}), flush=True)
    for rows in () if arguments.once else (32, 64, 128, 256):
        x = torch.randn(max(64, 2**21 // rows**2), 2 * rows, rows, device="cuda")
        a = x.mT @ x / (2 * rows) + 0.1 * torch.eye(rows, device="cuda")
        calls = {
            "ours": lambda a=a: co.linalg.spd_inverse_ex(a),
            "cholesky_inverse": lambda a=a: torch.cholesky_inverse(torch.linalg.cholesky_ex(a)[0]),
        }
        micro = {}
        for name, run in calls.items():
            try:
                micro |= event_medians({name: run}, lambda: None, 0.2)
            except RuntimeError as error:
                micro[name] = str(error)[:200]
        print(json.dumps({"spd_inverse": rows, "matrices": len(a), "us": micro}), flush=True)


if __name__ == "__main__":
    main()
