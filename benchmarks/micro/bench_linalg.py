"""co.linalg.spd_inverse and spd_solve against torch's own batched compositions, in the same run, interleaved.

    python -m benchmarks.micro.bench_linalg [--threads 1 2] [--seconds 3] [--json FILE]

Batches of random covariances.  Every composition of torch's operations that gives the same result is timed; `ratio` is
that of the medians, the fastest composition over ours.  One thread is timed by its processor time, which a busy machine
disturbs less; several by the clock.  A composition that raises is left out and named: with several
threads MKL's batched LU has done so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

import consistency_ops as co
from benchmarks.micro.timing import Group, interleaved, medians, save

BATCHES = {32: 1024, 64: 384, 128: 96, 256: 24}  # rows of a matrix: matrices
DTYPES = (torch.float32, torch.float64)


def covariances(n: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(BATCHES[n], 2 * n, n, dtype=dtype)
    return x.mT @ x / (2 * n) + 0.1 * torch.eye(n, dtype=dtype)


def factor(a: Tensor) -> Tensor:
    return torch.linalg.cholesky_ex(a)[0]


def triangular_inverse(a: Tensor) -> Tensor:
    w = torch.linalg.solve_triangular(factor(a), torch.eye(a.shape[-1], dtype=a.dtype).expand_as(a), upper=False)
    return w.mT @ w


def two_substitutions(a: Tensor, b: Tensor) -> Tensor:
    lower = factor(a)
    half = torch.linalg.solve_triangular(lower, b, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "ours": lambda a: co.linalg.spd_inverse_ex(a).inverse,
    "cholesky_inverse": lambda a: torch.cholesky_inverse(factor(a)),
    "cholesky_solve": lambda a: torch.cholesky_solve(torch.eye(a.shape[-1], dtype=a.dtype).expand_as(a), factor(a)),
    "solve_triangular": triangular_inverse,
    "inv_ex": lambda a: torch.linalg.inv_ex(a).inverse,
    "solve_ex": lambda a: torch.linalg.solve_ex(a, torch.eye(a.shape[-1], dtype=a.dtype).expand_as(a)).result,
}
SOLVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": lambda a, b: co.linalg.spd_solve_ex(a, b).result,
    "cholesky_solve": lambda a, b: torch.cholesky_solve(b, factor(a)),
    "solve_triangular": two_substitutions,
    "cholesky_inverse": lambda a, b: torch.cholesky_inverse(factor(a)) @ b,
    "solve_ex": lambda a, b: torch.linalg.solve_ex(a, b).result,
}


def group(n: int, dtype: torch.dtype, columns: int | None) -> tuple[Group, list[str]]:
    """The candidates that work, and the names of those that raise.  ``columns`` None: the inverse."""
    a = covariances(n, dtype)
    exact = torch.linalg.inv(a[:1].double())
    candidates: dict[str, Callable[[], object]] = {}
    raising = []
    b = None if columns is None else torch.randn(len(a), n, columns, dtype=dtype)
    functions = INVERSES if b is None else SOLVES
    for name, function in functions.items():
        arguments = (a,) if b is None else (a, b)
        try:
            result = function(*arguments)
        except RuntimeError:
            raising.append(name)
            continue
        wanted = exact if b is None else exact @ b[:1].double()
        torch.testing.assert_close(result[:1].double(), wanted, rtol=1e-2, atol=1e-3)
        candidates[name] = lambda function=function, arguments=arguments: function(*arguments)
    return Group(candidates, ours="ours"), raising


GROUPS = {
    f"{kind} of {n}": lambda n=n, columns=columns: group(n, torch.float32, columns)[0]
    for n in (32, 128)
    for kind, columns in (("inverse", None), ("solve", 16))
}


def measure(n: int, dtype: torch.dtype, columns: int | None, seconds: float) -> dict:
    found, raising = group(n, dtype, columns)
    candidates = dict(found.candidates)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    while True:
        try:
            median = medians(interleaved(candidates, seconds=seconds, rounds=(7, 201), clock=clock))
            break
        except RuntimeError:  # now and then, in a thread: MKL
            again, raising_now = group(n, dtype, columns)
            lost = "solve_ex" if "inv_ex" not in candidates else "inv_ex"
            raising = sorted({*raising, *raising_now, lost})
            candidates = {name: run for name, run in again.candidates.items() if name not in raising}
    theirs = {name: value for name, value in median.items() if name != "ours"}
    best = min(theirs, key=theirs.__getitem__)
    return {
        "operation": "inverse" if columns is None else "solve",
        "n": n,
        "columns": columns,
        "batch": BATCHES[n],
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "clock": clock.__name__,
        "us_per_matrix": {name: value / BATCHES[n] * 1e6 for name, value in median.items()},
        "best": best,
        "ratio": theirs[best] / median["ours"],
        "raised": raising,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed work for each row of the table")
    parser.add_argument("--json", help="write here instead of benchmarks/results/linalg.json")
    arguments = parser.parse_args()
    print("operation    n columns  dtype    threads  ours us a matrix  fastest of torch      us  ratio")
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in DTYPES:
            for n in BATCHES:
                for columns in (None, 1, 16, n):
                    row = measure(n, dtype, columns, arguments.seconds)
                    rows.append(row)
                    print(
                        f"{row['operation']:<9} {n:>4} {columns or '':>7}  {row['dtype']:<8} {threads:>7} "
                        f"{row['us_per_matrix']['ours']:>17.2f}  {row['best']:<16} "
                        f"{row['us_per_matrix'][row['best']]:>8.2f} {row['ratio']:>6.2f}",
                        flush=True,
                    )
    save("linalg", {"rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
