"""How the time of foreach_precondition_ grows with rows, width, layers and threads, against the slope that is expected.

    python -m benchmarks.micro.bench_scaling [--seconds 1] [--cpu-time] [--json FILE]

Each series changes one quantity and keeps the others such that the operation count is proportional to it:

    rows      n, with few outputs: the covariance, n B (B + 1) per chunk, is most of the work         slope 1
    width     units d of layers with 512 outputs and 512 rows, in chunks of B: d / B chunks           slope 1
    layers    equal layers                                                                            slope 1
    threads   equal layers, wall time                                                                 slope -1

The points of a series are measured in interleaved rounds.  The measured slope is that of the least-squares line through
the logarithms.  Writes scaling.json and scaling.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import consistency_ops as co
from benchmarks.micro.timing import Group, add_clock, interleaved, medians, save

CHUNK = 128
EXPECTED = {"rows": 1, "width": 1, "layers": 1, "threads": -1}
LABELS = {"rows": "rows n", "width": "units d", "layers": "layers", "threads": "threads"}


@dataclasses.dataclass(frozen=True)
class Point:
    """``layers`` equal layers of ``outputs`` x ``width`` with ``rows`` rows of inputs, on ``threads`` threads."""

    rows: int = 512
    outputs: int = 512
    width: int = 512
    layers: int = 1
    threads: int = 1

    def correction(self) -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(self.outputs, self.width, generator=generator) for _ in range(self.layers)]
        inputs = [torch.randn(self.rows, self.width, generator=generator) for _ in range(self.layers)]

        def run() -> None:
            torch.set_num_threads(self.threads)
            # With trace scaling and damping 1 a call changes the gradients by at most a factor of two.
            co.foreach_precondition_(grads, inputs, chunk=CHUNK, scaling="trace", max_rows=self.rows)

        return run


def series(threads: int, cores: int) -> dict[str, list[Point]]:
    """Return the points of every series; ``threads`` is for the series in which threads do not change."""
    point = functools.partial(Point, threads=threads)
    return {
        "rows": [point(rows=1024 << i, outputs=32) for i in range(6)],
        "width": [point(width=256 << i) for i in range(6)],
        "layers": [point(width=256, outputs=256, layers=1 << i) for i in range(7)],
        "threads": [Point(layers=16, threads=count) for count in range(1, cores + 1)],
    }


def group(name: str, points: list[Point]) -> Group:
    # From large to small: what follows a much larger point starts with cold caches, which a large one does not notice.
    return Group({getattr(point, name): point.correction() for point in reversed(points)})


GROUPS = {name: lambda name=name: group(name, series(1, 1)[name][:3]) for name in ("rows", "width", "layers")}


def slope(x: list[float], y: list[float]) -> float | None:
    """Return the slope of the least-squares line through the logarithms; None for a single point."""
    if len(x) < 2:
        return None
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def measure(name: str, points: list[Point], seconds: float, clock: Callable[[], float]) -> dict:
    corrections = group(name, points).candidates
    # CPU time is the sum over threads and says nothing about them.
    clock = time.perf_counter if name == "threads" else clock
    median = medians(interleaved(corrections, seconds=seconds * len(points), clock=clock))
    x, ms = list(median)[::-1], [1e3 * value for value in median.values()][::-1]
    return {
        "series": name,
        "fixed": {key: value for key, value in dataclasses.asdict(points[0]).items() if key != name},
        "x": x,
        "ms": ms,
        "slope": slope(x, ms),
        "expected_slope": EXPECTED[name],
    }


def plot(results: dict, path: Path) -> None:
    """Draw four log-log panels; dashed lines have the expected slope and pass through the last point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for axis, row in zip(axes, results["rows"], strict=True):
        x, ms = row["x"], row["ms"]
        anchor = 0 if row["series"] == "threads" else -1
        line = [ms[anchor] * (value / x[anchor]) ** row["expected_slope"] for value in x]
        axis.loglog(x, line, "--", color="grey", label=f"slope {row['expected_slope']}")
        measured = "" if row["slope"] is None else f", slope {row['slope']:.2f}"
        axis.loglog(x, ms, "o-", label=f"measured{measured}")
        axis.set_xticks(x, [str(value) for value in x], rotation=45)
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # a panel may span less than a decade
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel(LABELS[row["series"]])
        axis.legend(frameon=False, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms per call")
    figure.suptitle(f"foreach_precondition_, float32, chunk {CHUNK}, CPU")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of the series in which threads do not change")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed work for each point")
    parser.add_argument("--points", type=int, help="only so many of each series")
    add_clock(parser, "; never for the series of threads")
    parser.add_argument("--json", help="write here instead of benchmarks/results/scaling.json, the plot beside it")
    arguments = parser.parse_args()
    results = {"chunk": CHUNK, "clock": arguments.clock.__name__, "rows": []}
    for name, points in series(arguments.threads, len(os.sched_getaffinity(0))).items():
        results["rows"].append(measure(name, points[: arguments.points], arguments.seconds, arguments.clock))
        row = results["rows"][-1]
        found = "-" if row["slope"] is None else f"{row['slope']:.2f}"
        shown = "  ".join(f"{x}: {ms:.3f}" for x, ms in zip(row["x"], row["ms"], strict=True))
        print(f"{name:<8} slope {found} (expected {EXPECTED[name]})   ms  {shown}", flush=True)
    torch.set_num_threads(arguments.threads)
    plot(results, save("scaling", results, arguments.json).with_suffix(".png"))


if __name__ == "__main__":
    main()
