"""The comparison with other optimizers: runs what is not in benchmarks/results/peers yet, and prints the tables.

Every optimizer gets eight trials (half of the steps, seed 0, judged on held-out training examples), then the best
setting is run with three other seeds, judged on test examples.  One thread; seconds are CPU seconds of the steps alone.

These are the first hundred steps. ``python -m benchmarks.peers full --help``: whole trainings with warm-up and decay.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

from benchmarks import DATA
from benchmarks.peers import full, tables
from benchmarks.peers.optimizers import MISSING, PEERS
from benchmarks.peers.runs import RESULTS, Store, compete
from benchmarks.peers.tasks import TASKS

QUICK = Path("runs", "peers")


def main() -> None:
    if sys.argv[1:2] == ["full"]:  # whole trainings
        full.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="of the final runs")
    parser.add_argument("--steps", type=int, help="of a final run, instead of the task's own number")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=DATA,
        help=f"holds mnist/, fashion-mnist/, cifar10/ (default: {DATA}; CONSISTENCY_OPS_DATA sets it)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON lines")
    parser.add_argument(
        "--quick", action="store_true", help=f"char-gpt, which needs no data files, 60 steps, one seed, into {QUICK}"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tasks, arguments.steps, arguments.seeds, arguments.out = ["char-gpt"], 60, 1, QUICK
    if not arguments.tasks or (unknown := [task for task in arguments.tasks if task not in TASKS]):
        parser.error(f"TASK must be of {', '.join(TASKS)}, got {unknown[0] if arguments.tasks else 'none'}")
    warnings.filterwarnings("ignore", message=".*non-full backward hook.*")  # asdfghjkl's
    torch.set_num_threads(1)  # CPU seconds of one thread can be compared on a busy machine
    peers = [name for name in arguments.optimizers if PEERS[name].version]
    for name in arguments.optimizers:
        if name not in peers:
            print(f"{name}: skipped, {PEERS[name].package} is not installed (requirements-peers.txt)")
    for name, reason in MISSING.items():
        print(f"{name}: not compared, {reason}")
    for task in arguments.tasks:
        store = Store(arguments.out / f"{task}.jsonl")
        compete(store, task, peers, TASKS[task].load(arguments.data_dir), arguments.seeds, arguments.steps)
        print(f"\n{TASKS[task].text}\n\n{tables.finals(store.runs, task)}\n")


if __name__ == "__main__":
    main()
