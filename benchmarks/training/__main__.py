"""Runs an experiment, by its name.

    python -m benchmarks.training                    what there is
    python -m benchmarks.training deep-mlp           run it, or go on with it; figures and JSON in results/training
    python -m benchmarks.training deep-mlp --epochs 20 --train 60000 --seeds 0 1 2

The default sizes fit two cores; every number of an experiment's SIZE can be set by an option of its name.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks import DATA
from benchmarks.training import fit, runner


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=not arguments or arguments[0] not in runner.EXPERIMENTS,
    )
    parser.add_argument("name", nargs="?", choices=runner.EXPERIMENTS)
    name = parser.parse_known_args(arguments)[0].name
    if name is None:
        for name in runner.EXPERIMENTS:
            print(f"{name:<16} {runner.load(name).TITLE}")
        return
    run(name, runner.load(name), arguments[1:])


def run(name: str, experiment, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.training {name}",
        description=experiment.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        choices=[*experiment.SETTINGS, "all"],
        default=getattr(experiment, "DEFAULT", list(experiment.SETTINGS)),
        metavar="RUN",
        help=f"names, or all: {'; '.join(experiment.SETTINGS)}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    for key, value in experiment.SIZE.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help=f"folder of the published files (default: that of the data set in {DATA}; CONSISTENCY_OPS_DATA sets it)",
    )
    parser.add_argument("--again", action="store_true", help="repeat runs that are stored")
    parser.add_argument("--plot", action="store_true", help="run nothing, draw the figure of what is stored")
    parser.add_argument("--out", type=Path, default=runner.RESULTS, help="folder of the JSON and the figure")
    options = parser.parse_args(arguments)
    size = {key: getattr(options, key) for key in experiment.SIZE}
    torch.set_num_threads(1)  # results, and process times, that do not depend on the machine's cores
    store = runner.Store(options.out / f"{name}.json", getattr(experiment, "COMPARED", ()))
    if not options.plot:
        data = partial(fit.load, experiment.DATA, size, options.data_dir or DATA / str(experiment.DATA))
        names = list(experiment.SETTINGS) if "all" in options.runs else options.runs
        runner.run(experiment, store, names, options.seeds, size, data, options.again)
    results = store.results(experiment.SETTINGS)
    if not results:
        sys.exit(f"{store.path}: holds no finished run of {name}; run it without --plot")
    runner.draw(experiment, results, options.out / f"{name}.png")
    print("\n".join(experiment.lines(results)))


if __name__ == "__main__":
    main(sys.argv[1:])
