"""The time that the preconditioner adds to a training step of the MNIST deep MLP at batch 500, in every step.

    python -m benchmarks.micro.bench_step [--threads N] [--seconds 20] [--json FILE]

The data is random and has MNIST's shape; time does not depend on its values.  A step is zero_grad, forward, backward
and the optimizer's step (SGD with momentum).  It is interleaved with the same step of a second network that has the
RMS norms, too, but no preconditioner; figures are medians.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional

import consistency_ops as co
from benchmarks.micro.timing import Group, add_clock, interleaved, medians, save
from consistency_ops.cli import models

BATCH = 500
SETTINGS = {  # name: arguments of Preconditioner, None without one
    "sgd": None,
    "preconditioned": {},
    "preconditioned, chunk 64": {"chunk": 64},
    "preconditioned, chunk 256": {"chunk": 256},
    "preconditioned, every 4": {"every": 4},
}


def step_of(options: dict | None, x: torch.Tensor, y: torch.Tensor):
    model = models.build("deep-mlp", (1, 28, 28), 10, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    preconditioner = None if options is None else co.Preconditioner(model, optimizer, **options)

    def step() -> nn.Module:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        return model

    step.keep = preconditioner  # the hooks live as long as this object
    return step


def group() -> Group:
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    candidates = {name: step_of(options, x, y) for name, options in SETTINGS.items()}
    return Group(candidates, ours="preconditioned", baselines=("sgd",))


GROUPS = {"deep MLP, batch 500": group}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0)
    add_clock(parser)
    parser.add_argument("--json", help="write here instead of benchmarks/results/step.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    times = interleaved(group().candidates, seconds=arguments.seconds, rounds=(20, 2000), clock=arguments.clock)
    median = medians(times)
    results = []
    for name, seconds in median.items():
        added = seconds / median["sgd"] - 1
        results.append({"name": name, "ms": 1e3 * seconds, "best_ms": 1e3 * min(times[name]), "added": added})
        print(f"{name:<28} {1e3 * seconds:8.2f} ms per step, {added:+.1%}")
    save("step", {"batch": BATCH, "rounds": len(times["sgd"]), "rows": results}, arguments.json)


if __name__ == "__main__":
    main()
