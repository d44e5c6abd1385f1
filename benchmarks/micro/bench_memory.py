"""Peak extra memory of one foreach_precondition_ call: growth of the resident set in a fresh process.

    python -m benchmarks.micro.bench_memory [--json FILE]

Measures the high-water mark of the resident set (VmHWM, reset through /proc/self/clear_refs; Linux) during a call, less
the resident set before it.  A call on a small layer has loaded the code and started the threads before.  The bound is
the chunks of the largest layer plus, for every thread, one packed block of rows (512 KiB) and two chunks of scratch; it
does not grow with the network.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys

import torch

import consistency_ops as co
from benchmarks.micro.timing import save
from benchmarks.micro.workloads import WORKLOADS

PANEL = 16  # chunks are padded to a multiple of this
PACKED_BYTES = 512 << 10  # kPackedBytes of csrc/cpu/plan.h
SLACK_BYTES = 256 << 10  # for tables of the divisions, Python objects and partly used pages


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def padded(units: int, chunk: int) -> list[int]:
    count = -(-units // chunk)
    sizes = [units // count + (c < units % count) for c in range(count)]
    return [-(-size // PANEL) * PANEL for size in sizes]


def bound(name: str, chunk: int, threads: int) -> int:
    layers = [padded(layer.units, chunk) for layer in WORKLOADS[name].layers]
    largest_chunk = max(max(sizes) for sizes in layers)
    storage = max(max(sum(size**2 for size in sizes) for sizes in layers), 2 * threads * largest_chunk**2)
    a_thread = PACKED_BYTES + 4 * 128 * largest_chunk + 2 * 4 * largest_chunk**2
    return 4 * storage + threads * a_thread + SLACK_BYTES


def child(name: str, chunk: int, rows: int) -> None:
    grads, inputs = WORKLOADS[name].tensors(rows)
    for _ in range(2):
        co.foreach_precondition_([torch.randn(512, 512)], [torch.randn(512, 512)], chunk=32)
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = resident("VmRSS")
    co.foreach_precondition_(grads, inputs, damping=0.1, chunk=chunk)
    extra = resident("VmHWM") - before
    tensor_bytes = sum(t.nbytes for t in (*grads, *inputs))
    print(json.dumps({"extra_bytes": extra, "tensor_bytes": tensor_bytes, "threads": torch.get_num_threads()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--json", help="write here instead of benchmarks/results/memory.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], int(arguments.child[1]), arguments.rows)
        return
    results = []
    for name in WORKLOADS:
        for chunk in (32, 128, 256):
            command = [sys.executable, "-m", "benchmarks.micro.bench_memory", "--rows", str(arguments.rows)]
            output = subprocess.run([*command, "--child", name, str(chunk)], check=True, capture_output=True, text=True)
            result = {"workload": name, "chunk": chunk, "rows": arguments.rows, **json.loads(output.stdout)}
            result["bound_bytes"] = bound(name, chunk, result["threads"])
            results.append(result)
            print(
                f"{name:<12} chunk {chunk:>3}: extra {result['extra_bytes'] / 2**20:7.2f} MiB, "
                f"bound {result['bound_bytes'] / 2**20:7.2f} MiB, tensors {result['tensor_bytes'] / 2**20:7.0f} MiB"
            )
            save("memory", {"rows": results}, arguments.json)
    if any(result["extra_bytes"] > result["bound_bytes"] for result in results):
        sys.exit("the bound does not hold")


if __name__ == "__main__":
    main()
