"""A refresh of the preconditioner for whole layers, and a step that reuses it: processor time and memory by width.

    python -m benchmarks.micro.bench_wide [--widths 768,4096,11008] [--json FILE]

A refresh sums the covariance of the rows, factors and inverts it, and corrects the gradient; between
two refreshes (`every`) a step only corrects. Beside them, in turns and in the same process, a refresh out of plain
torch calls: X^T X, `cholesky_ex`, `cholesky_inverse`, a product. Every width has a process of its own. Memory: growth
of the resident set (VmHWM, Linux): what is kept from step to step, and the peak above it during a refresh.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time

import torch

import consistency_ops as co
from benchmarks.micro.bench_memory import resident
from benchmarks.micro.timing import save

ROWS, OUTPUTS = 2048, 1024
REPEATS = {768: 21, 4096: 3, 11008: 1}


def plain(grad: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    covariance = rows.T @ rows / len(rows)
    covariance /= covariance.diagonal().mean()
    covariance.diagonal().add_(0.2)
    factor, _ = torch.linalg.cholesky_ex(covariance)
    return grad @ torch.cholesky_inverse(factor)


def seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def child(width: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = dict(chunk=None, damping=0.2, every=2, max_rows=ROWS)
    small = torch.nn.Linear(512, 8)
    warm = co.Preconditioner(small, **options)
    for _ in range(3):  # the libraries' own buffers
        small(torch.randn(ROWS, 512)).square().sum().backward()
        warm.step()
    model = torch.nn.Linear(width, OUTPUTS, bias=False)
    x = torch.randn(ROWS, width)
    model(x).sum().backward()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = resident("VmRSS")
    pre = co.Preconditioner(model, **options)
    refresh, reuse, other = [], [], []
    for repeat in range(REPEATS.get(width, 3)):
        for times in (refresh, reuse):
            model(x)
            model.weight.grad.normal_()
            times.append(seconds(pre.step))
            if repeat == 0 and times is refresh:
                peak = resident("VmHWM") - before
                ctypes.CDLL(None).malloc_trim(0)  # what is free in the heap is not kept
                kept = resident("VmRSS") - before
        other.append(seconds(lambda: plain(model.weight.grad, x)))
    assert pre.stats()["failed_chunks"] == 0
    row = {"width": width, "rows": ROWS, "outputs": OUTPUTS, "repeats": len(refresh)}
    row |= {"refresh_s": statistics.median(refresh), "reuse_s": statistics.median(reuse)}
    row |= {"plain_refresh_s": statistics.median(other), "kept_bytes": kept, "peak_bytes": peak}
    row["times_plain"] = row["refresh_s"] / row["plain_refresh_s"]
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="768,4096,11008", help="units of a layer, comma-separated")
    parser.add_argument("--json", help="write here instead of benchmarks/results/wide.json")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    rows = []
    print("units   refresh s   reuse s   plain s   refresh/plain   kept MiB   peak MiB")
    for width in map(int, arguments.widths.split(",")):
        command = [sys.executable, "-m", "benchmarks.micro.bench_wide", "--child", str(width)]
        output = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(output.stdout)
        rows.append(row)
        print(
            f"{width:>5} {row['refresh_s']:>11.3f} {row['reuse_s']:>9.4f} {row['plain_refresh_s']:>9.3f} "
            f"{row['times_plain']:>15.2f} {row['kept_bytes'] / 2**20:>10.0f} {row['peak_bytes'] / 2**20:>10.0f}",
            flush=True,
        )
        save("wide", {"clock": "process_time, one thread", "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
