"""Changes one setting of the preconditioner at a time: this is where its defaults come from.

    python -m benchmarks.peers.ablations [--tasks NAME ...] [--bases NAME ...] [--seeds 2] [--data-dir DIR]

The rate is the best of the base's trials with the defaults (``python -m benchmarks.peers`` must have run).  A change
that may move the best rate has the best of three: a third, the same, and three times it, chosen with seed 0.  The
variants of activation and norm have the best of a grid in half decades.  All are judged on held-out training examples.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import DATA
from benchmarks.peers.runs import RESULTS, Store, last, run_once
from benchmarks.peers.tasks import TASKS, VARIANTS, Split

SAME_RATE: dict[str, dict[str, object]] = {
    "defaults": {},
    "chunk 32": {"chunk": 32},
    "chunk 64": {"chunk": 64},
    "chunk 256": {"chunk": 256},
    "group 1": {"group": 1},
    "group 16": {"group": 16},
    "max_rows 128": {"max_rows": 128},
    "bias left alone": {"bias": False},
}
BEST_RATE: dict[str, dict[str, object]] = {
    **{f"trace, damping {value:g}": {"damping": value} for value in (1.0, 0.3, 0.1, 0.03, 0.01)},
    **{f"absolute, damping {value:g}": {"damping": value, "scaling": "absolute"} for value in (1.0, 0.01)},
    "decay 0.5": {"decay": 0.5},
    "decay 0.9": {"decay": 0.9},
    "every 4": {"every": 4},
    "every 10": {"every": 10},
    "decay 0.5, every 4": {"decay": 0.5, "every": 4},
    "decay 0.5, every 10": {"decay": 0.5, "every": 10},
    "decay 0.9, every 10": {"decay": 0.9, "every": 10},
    "damping 0.1 to 1 over the run": {"anneal": [0.1, 1.0, 80]},
    "damping by Ledoit and Wolf": {"shrinkage": True},
    "norm of the raw gradient": {"graft": "norm"},
    "norm at most the raw gradient's": {"graft": "clip"},
    "norm of the outputs' change": {"graft": "metric"},
}
SGD_ONLY = {"correction after the momentum": {"momentum_first": 0.9}}
TASK_NAMES = ("autoencoder", "deep-mlp")
BASES = ("sgd+pre", "adamw+pre", "muon+pre")
STEPS = 80
VARIANT_PHASE = "activation and norm"
GRID = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
# Indices in GRID of the first of three rates that are tried: 0.1, 0.01 and 0.03.
VARIANT_PEERS = {"sgd": 3, "sgd+pre": 3, "adamw": 5, "adamw+pre": 5, "muon": 4, "muon+pre": 4}
FAMILIES = {"deep-mlp variants": "deep-mlp,", "fashion-mlp variants": "fashion-mlp,"}


def best_rate(task: str, base: str) -> float:
    """Return the best rate of the trials at the default damping."""
    runs = [run for run in Store(RESULTS / f"{task}.jsonl").runs if run["optimizer"] == base]
    trials = [run for run in runs if run["phase"] == "trial" and "damping" not in run["setting"]]
    if not trials:
        raise SystemExit(f"ablations: {task} has no trials of {base} yet; run python -m benchmarks.peers {task}")
    return min(trials, key=last)["setting"]["lr"]


def nearby(rate: float) -> list[float]:
    return [rate, rate / 3, rate * 3]


def table(runs: list[dict]) -> dict[str, dict[str, tuple[float, float] | None]]:
    """Return {change: {"task, base": (mean, half range) over the seeds from 1 on, or None if a seed failed}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if run["seed"] > 0:
            cells = found.setdefault(run["phase"], {})
            cells.setdefault(f"{run['task']}, {run['optimizer']}", []).append(last(run))
    return {
        change: {
            column: None if math.isinf(max(ends)) else (statistics.mean(ends), (max(ends) - min(ends)) / 2)
            for column, ends in cells.items()
        }
        for change, cells in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, *FAMILIES], default=[*TASK_NAMES, *FAMILIES])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["sgd+pre"])
    parser.add_argument("--changes", nargs="+", choices=[*SAME_RATE, *BEST_RATE, *SGD_ONLY], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--data-dir", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(arguments.out)
    for task in arguments.tasks:
        if task in FAMILIES:
            run_variants(store, FAMILIES[task], arguments.data_dir, arguments.seeds, arguments.steps)
            continue
        split = TASKS[task].load(arguments.data_dir)
        for base in arguments.bases:
            rate = best_rate(task, base)
            moved = BEST_RATE | (SGD_ONLY if base == "sgd+pre" else {})
            plans = [(name, options, [rate]) for name, options in SAME_RATE.items()]
            plans += [(name, options, nearby(rate)) for name, options in moved.items()]
            for name, options, rates in plans:
                if arguments.changes and name not in arguments.changes:
                    continue
                settings = [{"lr": lr, **options} for lr in rates]
                try_out(store, task, base, name, settings, split, arguments.seeds, arguments.steps)


def try_out(
    store: Store, task: str, peer: str, name: str, settings: list[dict], split: Split, seeds: int, steps: int
) -> None:
    """Find the best of ``settings`` with seed 0, and run it with the seeds 1, 2, ..."""
    best = settings[0]
    if len(settings) > 1:
        tried = [run_once(store, task, peer, name, setting, split, 0, steps) for setting in settings]
        best = min(tried, key=last)["setting"]
    for seed in range(1, seeds + 1):
        run_once(store, task, peer, name, best, split, seed, steps)


def run_variants(store: Store, family: str, directory: Path, seeds: int, steps: int) -> None:
    """Run all activations and normalisations with and without the correction, each at its own best rate."""
    names = [name for name in VARIANTS if name.startswith(family)]
    split = VARIANTS[names[0]].load(directory)
    for task in names:
        for peer, first in VARIANT_PEERS.items():
            run = partial(run_once, store, task, peer, VARIANT_PHASE, split=split, steps=steps)
            best = best_in_grid(lambda setting, run=run: last(run(setting, seed=0)), first)
            for seed in range(1, seeds + 1):
                run(best, seed=seed)


def best_in_grid(metric: Callable[[dict], float], first: int) -> dict:
    """Return the best of three rates of ``GRID`` from index ``first`` on; while an end is the best, add a rate there.

    The smallest rate counts as the best among equals and if all fail.
    """
    begin, end = first, first + 3
    while True:
        best = min(reversed(range(begin, end)), key=lambda i: metric({"lr": GRID[i]}))
        if best == begin > 0:
            begin -= 1
        elif best == end - 1 < len(GRID) - 1:
            end += 1
        else:
            return {"lr": GRID[best]}


if __name__ == "__main__":
    main()
