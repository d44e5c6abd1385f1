"""Timing helpers that every benchmark here shares: interleaved medians, the machine, JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import consistency_ops as co

RESULTS = Path(__file__).resolve().parents[1] / "results"


def interleaved(
    candidates: dict[str, Callable[[], object]],
    *,
    before: Callable[[], object] = lambda: None,
    seconds: float = 5.0,
    rounds: tuple[int, int] = (5, 51),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every candidate, one of each a round, so that a disturbance hits all of them.

    ``before`` runs, untimed, before every candidate.  After two warm-up rounds, as many rounds as fit ``seconds``,
    within ``rounds``.  ``clock``: ``time.process_time`` on a busy machine, which is fair for a single thread only.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    spent = 0.0
    for turn in range(rounds[1] + 2):
        if turn == 2:
            spent, times = 0.0, {name: [] for name in candidates}
        if turn >= rounds[0] + 2 and spent > seconds:
            break
        for name, run in candidates.items():
            before()
            start = clock()
            run()
            times[name].append(clock() - start)
            spent += times[name][-1]
    return times


def one_thread(about: str, name: str, seconds: float, of: str = "row of the table") -> argparse.Namespace:
    """``--seconds`` and ``--json`` of a benchmark that runs on one thread; ``of``: what is timed for so long."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=seconds, help=f"of timed work for each {of}")
    parser.add_argument("--json", help=f"write here instead of benchmarks/results/{name}.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    return arguments


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def command() -> str:
    """This run's, as it is typed, without ``--json FILE``: where its figures went does not matter to them."""
    spec = sys.modules["__main__"].__spec__
    arguments = sys.argv[1:]
    if "--json" in arguments:
        at = arguments.index("--json")
        del arguments[at : at + 2]
    return shlex.join(["python", *(["-m", spec.name] if spec else sys.argv[:1]), *arguments])


def machine() -> dict:
    """What a figure depends on."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        **{key: value for key, value in co.build_info().items() if key != "library"},
    }


def save(name: str, results: dict, path: str | None = None) -> Path:
    """Writes ``results`` and the machine as JSON; ``path``: instead of ``benchmarks/results/<name>.json``."""
    target = Path(path) if path else RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    return target
