"""What the benchmarks share: interleaved timing, the description of the machine, JSON."""

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
from dataclasses import dataclass
from pathlib import Path

import torch

import consistency_ops as co

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Group:
    """What is timed side by side: ours and its baselines, on the same data.

    A module's ``GROUPS`` names the small groups that ``pytest benchmarks/micro`` times one candidate after the other;
    its ``measure`` times groups of any size in turns, which gives the ratios of record.

    ``ours`` is compared with the strongest of ``baselines``, by default all others, in the table of
    ``python -m benchmarks.micro``; None where there is nothing to compare with.
    """

    candidates: dict[str, Callable[[], object]]
    before: Callable[[], object] = lambda: None  # runs untimed before every candidate
    ours: str | None = None
    baselines: tuple[str, ...] = ()


def interleaved(
    candidates: dict[str, Callable[[], object]],
    *,
    before: Callable[[], object] = lambda: None,
    seconds: float = 5.0,
    rounds: tuple[int, int] = (5, 51),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return seconds of every candidate. Each round runs all of them, so that a disturbance hits all.

    ``before`` runs untimed before every candidate.  After two warm-up rounds come as many rounds as fit ``seconds``,
    within the limits ``rounds``.  ``clock``: use ``time.process_time`` on a busy machine, with a single thread only.
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


def add_clock(parser: argparse.ArgumentParser, exception: str = "") -> None:
    """Add ``--cpu-time``, which makes ``clock`` of the arguments the CPU time; else it is the wall time."""
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help=f"CPU instead of wall time, for one thread on a busy machine{exception}",
    )


def one_thread(about: str, name: str, seconds: float, of: str = "row of the table") -> argparse.Namespace:
    """Parse ``--seconds`` and ``--json`` and use one thread; ``of`` says what is timed for ``--seconds``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=seconds, help=f"of timed work for each {of}")
    parser.add_argument("--json", help=f"write here instead of benchmarks/results/{name}.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    return arguments


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def command() -> str:
    """Return the command line of this run without the places of its data and results, which change no figure."""
    spec = sys.modules["__main__"].__spec__
    arguments = sys.argv[1:]
    for option in ("--json", "--out", "--data-dir"):
        if option in arguments:
            at = arguments.index(option)
            del arguments[at : at + 2]
    return shlex.join(["python", *(["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]), *arguments])


def machine() -> dict:
    """Return what a figure depends on: processor, threads, versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        **{key: value for key, value in co.build_info().items() if key != "library"},
    }


def save(name: str, results: dict, path: str | None = None) -> Path:
    """Write ``results`` and the machine as JSON to ``path``, by default ``benchmarks/results/<name>.json``."""
    target = Path(path) if path else RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    return target
