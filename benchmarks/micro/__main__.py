"""All small comparisons in one table: how many times as fast as the strongest baseline, measured in turns.

CPU time of one thread.  `python -m benchmarks.micro.bench_NAME` has every size, and writes the results of record.
"""

from __future__ import annotations

import importlib
import logging
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.micro import MODULES
from benchmarks.micro.timing import Group, interleaved, medians, one_thread, save

COLUMNS = "{:<38} {:<18} {:<22} {:>5}  {}"


def compare(group: Group, seconds: float, clock: Callable[[], float] = time.process_time) -> dict:
    """Return the strongest baseline of ``group`` and the quartiles, over the rounds, of its time over ours."""
    names = group.baselines or tuple(name for name in group.candidates if name != group.ours)
    candidates = {name: group.candidates[name] for name in (group.ours, *names)}
    times = interleaved(candidates, before=group.before, seconds=seconds, rounds=(11, 501), clock=clock)
    median = medians(times)
    strongest = min(names, key=median.__getitem__)
    ratios = [theirs / ours for theirs, ours in zip(times[strongest], times[group.ours], strict=True)]
    return {
        "ours": group.ours,
        "strongest": strongest,
        "rounds": len(ratios),
        "times_as_fast": statistics.quantiles(ratios, n=4),
    }


def main() -> None:
    arguments = one_thread(__doc__, "summary", seconds=2.0)
    torch.manual_seed(0)
    logging.disable()  # candidates that are not compared are thrown away: a preconditioner that never ran says so
    print(COLUMNS.format("what", "ours", "strongest baseline", "times", "as fast (quartiles of the rounds)"))
    rows = []
    for module in MODULES:
        for name, build in importlib.import_module(f"benchmarks.micro.bench_{module}").GROUPS.items():
            group = build()
            if group.ours is None:
                continue
            row = {"module": module, "group": name, **compare(group, arguments.seconds)}
            rows.append(row)
            low, middle, high = row["times_as_fast"]
            what = f"{module}: {name}".replace("_", " ")
            print(
                COLUMNS.format(what, row["ours"], row["strongest"], f"{middle:.2f}", f"{low:.2f} to {high:.2f}"),
                flush=True,
            )
    save("summary", {"rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
