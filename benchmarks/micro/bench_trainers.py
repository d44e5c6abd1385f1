"""Loss of GPT-2, ViT and ResNet after 50 steps in other people's trainers, with the preconditioner and without.

    python -m benchmarks.micro.bench_trainers [--seeds 3] [--json FILE]

Needs requirements-frameworks.txt.  The models and trainers are those of ``tests/support/trainers.py``: tiny, from
configuration, with random weights.  The result is the mean training loss of the last 10 steps, with the same seeds
with and without the preconditioner.  No time is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.micro.timing import save

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from support import frameworks, trainers


def measure(name: str, seeds: int) -> dict:
    train = trainers.MODELS[name]
    losses: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for seed in range(seeds):
            losses["without"].append(train(folder, seed, False))
            losses["with"].append(train(folder, seed, True))
    pairs = zip(losses["without"], losses["with"], strict=True)
    return {
        "name": name,
        "trainer": train.__doc__,
        "steps": trainers.STEPS,
        **losses,
        "lower": sum(with_it < without for without, with_it in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=trainers.MODELS, default=list(trainers.MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", help="write here instead of benchmarks/results/trainers.json")
    arguments = parser.parse_args()
    if missing := frameworks.missing():
        parser.error(f"{missing[0]} is not installed: pip install -r requirements-frameworks.txt")
    torch.set_num_threads(1)
    rows = []
    for name in arguments.models:
        rows.append(row := measure(name, arguments.seeds))
        means = (statistics.mean(row[key]) for key in ("without", "with"))
        print(
            "{:<8} {:.3f} without, {:.3f} with; lower in {} of {}".format(name, *means, row["lower"], arguments.seeds)
        )
    save("trainers", {"rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
