"""The fixed orthogonal filters of random orthogonal additive networks against a dense matrix.

    python -m benchmarks.micro.bench_orthogonal [--seconds 2] [--json FILE]

Times forward and backward of `co.nn.OrthogonalFilter` on 128 rows, on one thread in float32, interleaved; figures are
medians of processor time.
"""

from __future__ import annotations

import time

import torch

from benchmarks.micro.timing import Group, interleaved, medians, one_thread, save
from consistency_ops.nn import OrthogonalFilter
from consistency_ops.nn.orthogonal import FILTERS

ROWS = 128
SIZES = (64, 256, 1024, 4096)
KINDS = [kind for kind in FILTERS if kind != "identity"]


def group(features: int) -> Group:
    x = torch.randn(ROWS, features, requires_grad=True)
    grad = torch.randn(ROWS, features)
    filters = {kind: OrthogonalFilter(features, kind) for kind in KINDS}
    candidates = {kind: lambda f=f: torch.autograd.grad(f(x), x, grad) for kind, f in filters.items()}
    return Group(candidates, ours="permutation", baselines=("dense",))


GROUPS = {"256 features": lambda: group(256)}


def measure(features: int, seconds: float) -> dict:
    median = medians(interleaved(group(features).candidates, seconds=seconds, rounds=(5, 501), clock=time.process_time))
    return {"features": features, **{f"{kind}_us": value * 1e6 for kind, value in median.items()}}


def main() -> None:
    arguments = one_thread(__doc__, "orthogonal", seconds=2.0)
    print("features" + "".join(f"{kind + ' us':>16}" for kind in KINDS))
    rows = []
    for features in SIZES:
        row = measure(features, arguments.seconds)
        rows.append(row)
        print(f"{features:>8}" + "".join(f"{row[f'{kind}_us']:>16.1f}" for kind in KINDS))
    save("orthogonal", {"clock": "process_time, one thread", "rows_of_x": ROWS, "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
