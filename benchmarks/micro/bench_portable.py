"""The operators out of torch's own operations against the strongest composition of torch operations, in the same run.

    python -m benchmarks.micro.bench_portable [--seconds 4] [--json FILE]

`foreach_precondition_` of the portable path, and of the kernels, beside the compositions of
bench_precondition (compositions.py, without torch.compile), interleaved, on one thread; figures are medians of
processor time.  The compositions draw no division, look for no NaN and write no gradient in place.
"""

from __future__ import annotations

import statistics
import time

import torch

import consistency_ops as co
from benchmarks.micro.bench_precondition import DAMPING, baselines, relative_difference
from benchmarks.micro.compositions import divide
from benchmarks.micro.timing import Group, interleaved, medians, one_thread, save
from benchmarks.micro.workloads import WORKLOADS

CASES = (  # workload, chunk, rows
    ("mlp", 128, 1024),
    ("wide-mlp", 128, 1024),
    ("resnet50-fp32", 128, 1024),
    ("wide-mlp", 256, 512),
    ("linear-4096-fp32", 128, 1024),
)


def group(name: str, chunk: int, rows: int) -> tuple[Group, dict[str, float]]:
    """The group, and how far the result of each composition is from the portable one."""
    workload = WORKLOADS[name]
    generator = torch.Generator().manual_seed(1)
    divisions = [divide(layer, chunk, workload.group, generator) for layer in workload.layers]
    pristine, inputs = workload.tensors(rows)
    grads = [grad.clone() for grad in pristine]
    step = 0

    def restore() -> None:
        torch._foreach_copy_(grads, pristine)

    def portable(orders=(), step: int = 0) -> None:
        layers = list(range(len(grads)))
        torch.ops.consistency_ops_torch.foreach_precondition_(
            grads, [], inputs, list(orders), [], [], layers[: len(orders)], [], layers, [workload.group] * len(grads),
            DAMPING, False, chunk, 10_000, 0, step,
        )  # fmt: skip

    def next_step() -> int:  # every step draws another division
        nonlocal step
        step += 1
        return step

    candidates = {
        "portable": lambda: portable(step=next_step()),
        "kernels": lambda: co.foreach_precondition_(grads, inputs, damping=DAMPING, chunk=chunk, step=next_step()),
    }
    compositions = baselines(workload.layers, "none")
    for label, composition in compositions.items():
        candidates[label] = lambda f=composition: f(pristine, inputs, divisions)

    # All must have the same division and the same result, or the comparison means nothing.
    orders = [d.permutation(layer.units) for d, layer in zip(divisions, workload.layers, strict=True)]
    portable(orders)
    differences = {label: relative_difference(candidates[label](), grads) for label in compositions}
    assert max(differences.values()) < max(1e-3, 2 * torch.finfo(workload.grads).eps), differences

    return Group(candidates, restore, ours="portable", baselines=tuple(compositions)), differences


GROUPS = {"mlp": lambda: group("mlp", 128, 512)[0]}


def measure(name: str, chunk: int, rows: int, seconds: float) -> dict:
    found, differences = group(name, chunk, rows)
    times = interleaved(found.candidates, before=found.before, seconds=seconds, clock=time.process_time)
    median = medians(times)
    strongest = min(differences, key=median.get)
    return {
        "workload": name,
        "chunk": chunk,
        "rows": rows,
        "ms": {label: 1e3 * value for label, value in median.items()},
        "rounds": len(times["portable"]),
        "strongest": strongest,
        "ratio": median[strongest] / median["portable"],
        "largest_difference": max(differences.values()),
    }


def main() -> None:
    arguments = one_thread(__doc__, "portable", seconds=4.0)
    print("workload         chunk  rows  portable ms  kernels ms  best torch ms  ratio  strongest")
    results = []
    for case in CASES:
        row = measure(*case, arguments.seconds)
        results.append(row)
        ms = row["ms"]
        print(
            f"{row['workload']:<16} {row['chunk']:>5} {row['rows']:>5} {ms['portable']:>12.2f} {ms['kernels']:>11.2f} "
            f"{ms[row['strongest']]:>14.2f} {row['ratio']:>6.2f}  {row['strongest']}",
            flush=True,
        )
    ratios = [row["ratio"] for row in results]
    summary = {"geometric_mean_ratio": statistics.geometric_mean(ratios), "smallest_ratio": min(ratios)}
    print("  ".join(f"{key} {value:.2f}" for key, value in summary.items()))
    save("portable", {"clock": "process_time, one thread", "summary": summary, "results": results}, arguments.json)


if __name__ == "__main__":
    main()
