"""The settings of the preconditioner, one changed at a time: where its defaults come from.

    python -m benchmarks.peers.ablations [--tasks NAME ...] [--bases NAME ...] [--seeds 2] [--data-dir DIR]

The rate is the best of the base's trials with the defaults (``python -m benchmarks.peers`` must have run).  A change of
damping or scaling moves the best rate, so these rows have the best of three: a third, the same, and three times it.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch

from benchmarks.peers.runs import RESULTS, Store, last, run_once
from benchmarks.peers.tasks import DEFAULT_DATA, TASKS, VARIANTS

CHANGES: dict[str, dict[str, object]] = {
    "defaults": {},
    "chunk 32": {"chunk": 32},
    "chunk 64": {"chunk": 64},
    "chunk 256": {"chunk": 256},
    "group 1": {"group": 1},
    "group 16": {"group": 16},
    "max_rows 128": {"max_rows": 128},
    "decay 0.9": {"decay": 0.9},
    "every 4": {"every": 4},
    "every 10": {"every": 10},
    "decay 0.9, every 10": {"decay": 0.9, "every": 10},
    "bias left alone": {"bias": False},
}
DAMPINGS: dict[str, dict[str, object]] = {
    **{f"trace, damping {value:g}": {"damping": value} for value in (1.0, 0.3, 0.1, 0.01)},
    **{f"absolute, damping {value:g}": {"damping": value, "scaling": "absolute"} for value in (1.0, 0.01)},
}
TASK_NAMES = ("autoencoder", "fashion-mlp", "deep-mlp")
BASES = ("sgd+pre", "adamw+pre", "muon+pre")
STEPS = 80


def best_rate(task: str, base: str) -> float:
    runs = [
        run for run in Store(RESULTS / f"{task}.jsonl").runs if run["optimizer"] == base and run["phase"] == "trial"
    ]
    if not runs:
        raise SystemExit(f"ablations: {task} has no trials of {base} yet; run python -m benchmarks.peers {task}")
    return min(runs, key=last)["setting"]["lr"]


def nearby(rate: float) -> list[float]:
    return [rate / 3, rate, rate * 3]


def table(runs: list[dict]) -> dict[str, dict[str, tuple[float, float] | None]]:
    """{change: {"task, base": (mean of the metric over seeds at the best rate, its half spread)}}, None: all failed."""
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for run in runs:
        cell = found.setdefault(run["phase"], {}).setdefault(f"{run['task']}, {run['optimizer']}", {})
        cell.setdefault(run["setting"]["lr"], []).append(last(run))
    result: dict[str, dict[str, tuple[float, float] | None]] = {}
    for change, cells in found.items():
        for column, by_rate in cells.items():
            ends = min(by_rate.values(), key=statistics.mean)
            failed = math.isinf(max(ends))
            value = None if failed else (statistics.mean(ends), (max(ends) - min(ends)) / 2)
            result.setdefault(change, {})[column] = value
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, "variants"], default=[*TASK_NAMES, "variants"])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["sgd+pre"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--data-dir", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(arguments.out)
    seeds = range(1, arguments.seeds + 1)
    for task in arguments.tasks:
        if task == "variants":
            run_variants(store, arguments.data_dir, seeds, arguments.steps)
            continue
        split = TASKS[task].load(arguments.data_dir)
        for base in arguments.bases:
            rate = best_rate(task, base)
            plans = [(name, options, [rate]) for name, options in CHANGES.items()]
            plans += [(name, options, nearby(rate)) for name, options in DAMPINGS.items()]
            for name, options, rates in plans:
                for lr in rates:
                    for seed in seeds:
                        run_once(store, task, base, name, {"lr": lr, **options}, split, seed, arguments.steps)


def run_variants(store: Store, directory: Path, seeds: range, steps: int) -> None:
    """Activation and normalisation, with and without the correction, each at the best of three rates."""
    split = next(iter(VARIANTS.values())).load(directory)
    for task in VARIANTS:
        for peer in ("sgd", "sgd+pre"):
            for lr in (0.1, 0.03, 0.01):
                for seed in seeds:
                    run_once(store, task, peer, "activation and norm", {"lr": lr}, split, seed, steps)


if __name__ == "__main__":
    main()
