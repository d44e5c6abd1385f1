"""Host time that a covered layer adds to forward pass, backward pass and optimizer step, eager, in microseconds.

    python -m benchmarks.micro.bench_host [--seconds 5] [--json FILE]

The network is 50 small linear layers, so that nearly all of a step is Python, dispatcher and hooks.  In one run, one
thread, interleaved:

* ``hooks that do nothing``: torch's own price of the two hooks that a covered layer has;
* ``preconditioner``: ours in front of SGD, with the accelerator ``csrc/torch_abi`` where it is built;
* ``preconditioner, Python``: the same without the accelerator, as from a wheel;
* ``AdamW`` and ``fused AdamW`` instead of SGD, for scale;
* ``kfac-pytorch`` in front of SGD, where that package is installed.

Figures are medians of processor time, less those of the same network with plain SGD, divided by the number of layers.

A second table has the modes whose matrices outlive a step, beside the default in the same run: ``every=10``, with and
without the accelerator, of which the median step is one between two refreshes; ``decay=0.95``; ``mode="whiten"`` with
``every=10`` and ``every=1``.  New matrices of layers this small are mostly the padding to ``chunk``.

A third measurement is a loop as of reinforcement learning: 128 forward passes of one row through a perceptron of three
layers, one backward pass and one step of Adam.  It tells what part of such a step the preconditioner adds.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import consistency_ops as co
from benchmarks.micro.timing import Group, interleaved, medians, one_thread, save
from consistency_ops.ops.library import torch_abi

LAYERS, WIDTH, BATCH = 50, 8, 8
CALLS = 128  # of one row each, before a step
PHASES = ("forward", "backward", "step")
Step = Callable[[], object]


class Candidate:
    """A network with its optimizer; ``keep`` holds what must live as long."""

    def __init__(
        self,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        keep: Callable[..., object] | None = None,
        accelerator: bool = True,
        **options,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        self.optimizer = optimizer(self.model.parameters(), lr=1e-3, **options)
        self.step: Step = self.optimizer.step
        self.keep = None if keep is None else keep(self)
        self.accelerator = accelerator

    def run(self, x: torch.Tensor) -> list[float]:
        """Seconds of each phase of one training step."""
        if torch_abi is not None:
            torch_abi.use_host_path(self.accelerator)
        self.optimizer.zero_grad()
        times = [time.process_time()]
        loss = self.model(x).sum()
        times.append(time.process_time())
        loss.backward()
        times.append(time.process_time())
        self.step()
        times.append(time.process_time())
        if torch_abi is not None:
            torch_abi.use_host_path(True)
        return [end - begin for begin, end in itertools.pairwise(times)]


def hooks_that_do_nothing(candidate: Candidate) -> None:
    for layer in candidate.model:
        layer.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
        layer.weight.register_post_accumulate_grad_hook(lambda weight: None)


def kfac_pytorch(candidate: Candidate) -> object:
    from kfac.preconditioner import KFACPreconditioner

    preconditioner = KFACPreconditioner(candidate.model, factor_update_steps=1, inv_update_steps=10)
    candidate.step = lambda: (preconditioner.step(), candidate.optimizer.step())
    return preconditioner


def preconditioned(accelerator: bool = True, **options: Any) -> Candidate:
    return Candidate(
        keep=lambda c: co.Preconditioner(c.model, c.optimizer, **options), accelerator=accelerator, foreach=True
    )


def candidates() -> dict[str, Candidate]:
    found = {
        "plain": Candidate(foreach=True),
        "hooks that do nothing": Candidate(keep=hooks_that_do_nothing, foreach=True),
        "preconditioner": preconditioned(),
        "preconditioner, Python": preconditioned(accelerator=False),
        "AdamW": Candidate(torch.optim.AdamW, foreach=True),
        "fused AdamW": Candidate(torch.optim.AdamW, fused=True),
    }
    if importlib.util.find_spec("kfac") is not None:
        found["kfac-pytorch"] = Candidate(keep=kfac_pytorch, foreach=True)
    return found


def keeping_candidates() -> dict[str, Candidate]:
    return {
        "plain": Candidate(foreach=True),
        "preconditioner": preconditioned(),
        "every=10": preconditioned(every=10),
        "every=10, Python": preconditioned(accelerator=False, every=10),
        "decay=0.95": preconditioned(decay=0.95),
        'mode="whiten", every=10': preconditioned(mode="whiten", every=10),
        'mode="whiten", every=1': preconditioned(mode="whiten", every=1),
    }


def group() -> Group:
    """Whole steps; :func:`measure` tells the phases apart."""
    x = torch.randn(BATCH, WIDTH)
    steps = {name: lambda c=candidate: c.run(x) for name, candidate in candidates().items()}
    return Group(steps, ours="preconditioner", baselines=("plain",))


GROUPS = {f"{LAYERS} small layers": group}


def measure(
    seconds: float,
    rounds: tuple[int, int] = (50, 5000),
    make: Callable[[], dict[str, Candidate]] = candidates,
) -> list[dict]:
    """One row a candidate: what it adds to each phase, in microseconds a layer."""
    x = torch.randn(BATCH, WIDTH)
    found = make()
    times: dict[str, list[list[float]]] = {name: [] for name in found}
    end = time.perf_counter() + seconds
    for turn in range(rounds[1]):
        if turn >= rounds[0] and time.perf_counter() > end:
            break
        for name, candidate in found.items():
            times[name].append(candidate.run(x))
    warm = rounds[0] // 2
    median = {
        name: [statistics.median(phase) for phase in zip(*runs[warm:], strict=True)] for name, runs in times.items()
    }
    plain = median["plain"]
    return [
        {"name": name, **{p: 1e6 * (t - base) / LAYERS for p, t, base in zip(PHASES, phases, plain, strict=True)}}
        for name, phases in median.items()
        if name != "plain"
    ]


def loop_of_one_row(keep: Callable[[nn.Module, torch.optim.Optimizer], object] | None, accelerator: bool) -> Step:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs = torch.randn(CALLS, 1, 8).unbind()
    kept = None if keep is None else keep(model, optimizer)

    def step() -> object:
        if torch_abi is not None:
            torch_abi.use_host_path(accelerator)
        optimizer.zero_grad()
        torch.stack([model(x).sum() for x in inputs]).mean().backward()
        optimizer.step()
        if torch_abi is not None:
            torch_abi.use_host_path(True)
        return kept

    return step


def measure_one_row(seconds: float, rounds: tuple[int, int] = (20, 2000)) -> list[dict]:
    """One row a candidate: milliseconds of a step, and the share that is added to that of Adam."""
    times = interleaved(
        {
            "Adam": loop_of_one_row(None, True),
            "preconditioner": loop_of_one_row(co.Preconditioner, True),
            "preconditioner, Python": loop_of_one_row(co.Preconditioner, False),
        },
        seconds=seconds,
        rounds=rounds,
        clock=time.process_time,
    )
    median = medians(times)
    return [{"name": name, "ms": 1e3 * t, "added": t / median["Adam"] - 1} for name, t in median.items()]


def main() -> None:
    arguments = one_thread(__doc__, "host", 5.0, "the whole run")
    rows = measure(arguments.seconds)
    keeping = measure(arguments.seconds, make=keeping_candidates)
    loop = measure_one_row(arguments.seconds)
    accelerator = co.build_info()["torch_abi"]
    print(f"{'us a layer, over plain SGD':<28}" + "".join(f"{phase:>10}" for phase in PHASES))
    for row in [*rows, *keeping]:
        print(f"{row['name']:<28}" + "".join(f"{row[phase]:10.1f}" for phase in PHASES))
    for row in loop:
        print(f"{CALLS} forward passes of one row, {row['name']:<24} {row['ms']:8.2f} ms a step, {row['added']:+.1%}")
    sizes = {"layers": LAYERS, "width": WIDTH, "batch": BATCH, "calls": CALLS}
    save(
        "host", {**sizes, "accelerator": accelerator, "rows": rows, "keeping": keeping, "one_row": loop}, arguments.json
    )


if __name__ == "__main__":
    main()
