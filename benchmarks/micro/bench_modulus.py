"""Modulus forward and backward against torch.abs, in the same run, interleaved.

    python -m benchmarks.micro.bench_modulus [--threads 1 2] [--seconds 4] [--json FILE]

A measurement is `torch.autograd.grad(f(x), x, grad)` with x and grad ready, repeated to about a millisecond; the ratio
is of medians over rounds, to torch.abs.  `kept` is what autograd holds for backward.  One thread is timed by its
processor time, which a busy machine disturbs less; several by the clock.  `python`: without the C++ node of
csrc/torch_abi, as modulus runs from a wheel or with another torch than the node was built for.  Up to some ten thousand
elements autograd decides, not the kernel.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

import consistency_ops as co
from benchmarks.micro.timing import Group, interleaved, medians, save

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
DTYPES = (torch.float32, torch.bfloat16)
IMPLEMENTATION = sys.modules[co.modulus.__module__]


def in_python(x: torch.Tensor) -> torch.Tensor:
    """co.modulus where csrc/torch_abi is not built."""
    node, IMPLEMENTATION._node = IMPLEMENTATION._node, None
    try:
        return co.modulus(x)
    finally:
        IMPLEMENTATION._node = node


FUNCTIONS = {"modulus": co.modulus, "abs": torch.abs, "python": in_python}


def kept_bytes(function, x: torch.Tensor) -> int:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        function(x)
    return sum(sizes)


def group(size: int, dtype: torch.dtype, repeats: int = 1) -> Group:
    x, grad = torch.randn(size).to(dtype).requires_grad_(), torch.randn(size).to(dtype)

    def run(function):
        for _ in range(repeats):
            torch.autograd.grad(function(x), x, grad)

    candidates = {name: lambda f=function: run(f) for name, function in FUNCTIONS.items()}
    return Group(candidates, ours="modulus", baselines=("abs",))


GROUPS = {f"{size} elements": lambda size=size: group(size, torch.float32) for size in (1_000, 1_000_000)}


def measure(size: int, dtype: torch.dtype, seconds: float) -> dict:
    x = torch.randn(size).to(dtype).requires_grad_()
    repeats = max(1, 1_000_000 // (size + 25_000))
    candidates = group(size, dtype, repeats).candidates
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    median = medians(interleaved(candidates, seconds=seconds, rounds=(11, 2001), clock=clock))
    return {
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "clock": clock.__name__,
        **{f"{name}_us": median[name] / repeats * 1e6 for name in FUNCTIONS},
        "ratio": median["modulus"] / median["abs"],
        "python_ratio": median["python"] / median["abs"],
        **{f"{name}_kept_bytes": kept_bytes(function, x) for name, function in FUNCTIONS.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=4.0, help="of timed work for each row of the table")
    parser.add_argument("--json", help="write here instead of benchmarks/results/modulus.json")
    arguments = parser.parse_args()

    print("  elements  dtype     threads   modulus us       abs us  ratio  python       kept   abs kept")
    results = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in DTYPES:
            for size in SIZES:
                row = measure(size, dtype, arguments.seconds)
                results.append(row)
                print(
                    f"{size:>10}  {row['dtype']:<9} {threads:>7} {row['modulus_us']:>12.1f} {row['abs_us']:>12.1f} "
                    f"{row['ratio']:>6.2f} {row['python_ratio']:>7.2f} {row['modulus_kept_bytes']:>10} "
                    f"{row['abs_kept_bytes']:>10}"
                )
    save("modulus", {"rows": results}, arguments.json)


if __name__ == "__main__":
    main()
