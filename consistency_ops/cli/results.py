"""The results of a run: the content of ``report.json``, its summary, and the table and verdict that are printed."""

from __future__ import annotations

import json
import os
import statistics
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..environment import build_info
from .files import write_whole

FORMAT = 1
# Test errors; for every method the first epoch at each of them is reported.
LEVELS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.12, 0.1, 0.07, 0.05, 0.04, 0.03, 0.02, 0.015, 0.01, 0.007, 0.005)


def begin(config: dict[str, Any], command: list[str], threads: int, device: torch.device) -> dict[str, Any]:
    """Return a report with everything that is known before training."""
    build = {key: value for key, value in build_info().items() if key != "library"}  # a path of this machine
    return {
        "format": FORMAT,
        "status": "running",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "config": config,
        "build": build,
        "machine": {
            "processor": build["cpu"],
            "threads": threads,
            "logical_cpus": os.cpu_count(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "packages": _packages("numpy", "matplotlib", "scikit-learn"),
    }


def _packages(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def heading(report: dict[str, Any]) -> list[str]:
    """Return the lines that say what will be trained."""
    config, d, machine = report["config"], report["data"], report["machine"]
    network = f"{config['activation']}, normalization {config['normalization']}, init {config['init']}"
    where = threads_text(report) if machine["device"] == "cpu" else machine["device"]
    return [
        f"{config['model']} ({report['model']['parameters']:,} weights; {network}) on {d['name']}: "
        f"{d['train_images']:,} training and {d['test_images']:,} test images",
        f"inputs: {d['inputs']}",
        f"batch {config['batch_size']}, {config['epochs']} epoch{'s' * (config['epochs'] > 1)}, {where}; "
        "every method starts from the same weights and sees the same batches",
        "",
    ]


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report atomically: neither a reader nor a crash meets half a file."""
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text))


def threads_text(report: dict[str, Any]) -> str:
    threads = report["machine"]["threads"]
    return f"{threads} thread{'s' if threads > 1 else ''}"


# ---- from curves to a summary


def curves(runs: list[dict[str, Any]], name: str) -> dict[str, list[list[float]]]:
    """Return the curves of one method: for every field, a list of epochs, each a list of values, one per seed.

    They end with the shortest run, and before the first loss that was not finite.
    """
    mine = [run["epochs"] for run in runs if run["method"] == name and run["epochs"]]
    fields = ("train_loss", "test_loss", "test_error", "seconds")
    result: dict[str, list[list[float]]] = {field: [] for field in fields}
    for epochs in zip(*mine, strict=False):
        if any(epoch["train_loss"] is None or epoch["test_loss"] is None for epoch in epochs):
            break
        for field in fields:
            result[field].append([epoch[field] for epoch in epochs])
    return result


def complete(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs of those seeds that every method finished; all runs if there is no such seed."""
    unfinished = {run["seed"] for run in runs if run["status"] not in ("finished", "diverged")}
    return [run for run in runs if run["seed"] not in unfinished] or runs


def summarise(report: dict[str, Any]) -> dict[str, Any]:
    """Return final and best test error, cost, and the first epoch at each level for every method (means over seeds)."""
    runs = complete(report["runs"])
    names = list(dict.fromkeys(run["method"] for run in runs))
    methods, means = {}, {}
    for name in names:
        curve = curves(runs, name)
        mine = [run for run in runs if run["method"] == name]
        means[name] = [
            (statistics.fmean(e), statistics.fmean(s))
            for e, s in zip(curve["test_error"], curve["seconds"], strict=True)
        ]
        diverged = sum(run["status"] == "diverged" for run in mine)
        methods[name] = {
            "lr": mine[0]["lr"],
            "runs": len(mine),
            "diverged": diverged,
            "epochs": len(means[name]),
            "final_test_error": None if diverged else _spread(curve["test_error"][-1:]),
            "best_test_error": _spread(
                [[min(seed) for seed in zip(*curve["test_error"], strict=True)]] if means[name] else []
            ),
            "final_train_loss": _spread(curve["train_loss"][-1:]),
            "seconds_per_epoch": means[name][-1][1] / len(means[name]) if means[name] else None,
        }
    for name in names:
        methods[name]["reached"] = [_first(means[name], level) for level in LEVELS]
    return {"levels": list(LEVELS), **_levels(methods), "methods": methods}


def _levels(methods: dict[str, Any]) -> dict[str, Any]:
    """Choose the levels to print, as indices into ``LEVELS``.

    ``headline`` is the hardest level that most methods reached, else the hardest that any reached, else None. ``shown``
    has the hardest level that all methods, most methods and any method reached: ascending, without repetition.
    """
    reached = [m["reached"] for m in methods.values() if m["final_test_error"] is not None]
    counts = [sum(one[i] is not None for one in reached) for i in range(len(LEVELS))]
    every, most, some = (
        max((i for i, n in enumerate(counts) if n >= least), default=None)
        for least in (max(len(reached), 1), len(reached) // 2 + 1, 1)
    )
    return {"headline": some if most is None else most, "shown": sorted({every, most, some} - {None})}


def _spread(values: list[list[float]]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": statistics.fmean(values[0]), "min": min(values[0]), "max": max(values[0])}


def _first(mean: list[tuple[float, float]], level: float) -> dict[str, float] | None:
    for epoch, (error, seconds) in enumerate(mean, 1):
        if error <= level:
            return {"epochs": epoch, "seconds": seconds, "test_error": error}
    return None


# ---- in words


def table(summary: dict[str, Any]) -> list[str]:
    """Return the summary as lines of text, one per method, with ``-`` where a level was not reached."""
    shown = [(i, summary["levels"][i]) for i in summary["shown"]]
    head = ["method", "rate", "s/epoch", "train loss", "final error", "best"]
    head += [f"to {100 * level:g} %: epochs (s)" for _, level in shown]
    rows = [head]
    for name, m in summary["methods"].items():
        if m["final_test_error"] is None:
            rows.append(
                [
                    name,
                    f"{m['lr']:g}",
                    f"diverged in {m['diverged']} of {m['runs']} runs" if m["diverged"] else "no epoch finished",
                ]
            )
            continue
        final, best = m["final_test_error"], m["best_test_error"]
        spread = f" ({100 * final['min']:.2f}..{100 * final['max']:.2f})" if m["runs"] > 1 else ""
        row = [name, f"{m['lr']:g}", f"{m['seconds_per_epoch']:.3g}", f"{m['final_train_loss']['mean']:.3g}"]
        row += [f"{100 * final['mean']:.2f} %{spread}", f"{100 * best['mean']:.2f} %"]
        row += [f"{r['epochs']} ({r['seconds']:.2f})" if r else "-" for r in (m["reached"][i] for i, _ in shown)]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows if len(row) == len(head)) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def verdict(report: dict[str, Any]) -> list[str]:
    """Return sentences that say who won and who lost; the report must have its summary."""
    summary = report["summary"]
    methods = summary["methods"]
    alive = {name: m for name, m in methods.items() if m["final_test_error"] is not None}
    lines = []
    if summary["headline"] is not None:
        lines += [_ranking(summary, unit, text) for unit, text in (("epochs", "{:.0f}"), ("seconds", "{:.2f} s"))]
        for name in alive:
            base = "sgd" if name == "sgd2" else name.removesuffix("+pre")
            if base != name and base in alive:
                lines.append(_pair(name, base, alive, summary["levels"]))
    if len(alive) > 1:
        order = sorted(alive, key=lambda name: alive[name]["final_test_error"]["mean"])
        first, last = (
            f"{name} {100 * alive[name]['final_test_error']['mean']:.2f} %" for name in (order[0], order[-1])
        )
        lines.append(f"Final test error: lowest {first}, highest {last}. {_noise(report, alive[order[0]])}")
    for name, m in methods.items():
        if m["diverged"]:
            lines.append(f"{name}: {m['diverged']} of {m['runs']} runs diverged at rate {m['lr']:g}.")
    if edges := _edges(report):
        lines.append(f"At the edge of the tried rates, so perhaps not at their best: {', '.join(edges)}.")
    return lines


def _ranking(summary: dict[str, Any], unit: str, form: str) -> str:
    """List the methods in the order in which they reached the headline level."""
    methods, index = summary["methods"], summary["headline"]
    reached = {name: m["reached"][index][unit] for name, m in methods.items() if m["reached"][index]}
    order = ", ".join(f"{name} {form.format(reached[name])}" for name in sorted(reached, key=reached.__getitem__))
    missed = ", ".join(name for name in methods if name not in reached)
    never = f"; not reached by {missed}" if missed else ""
    return f"{unit.capitalize()} to {100 * summary['levels'][index]:g} % test error: {order}{never}."


def _edges(report: dict[str, Any]) -> list[str]:
    """Return the methods whose best rate is the lowest or highest that was tried: a better one may lie outside."""
    search = report["rate_search"]
    tried = {name: [trial["lr"] for trial in search["trials"].get(name, [])] for name in search["chosen"]}
    return [name for name, rates in tried.items() if search["chosen"][name] in (*rates[:1], *rates[-1:])]


def _pair(name: str, base: str, methods: dict[str, Any], levels: list[float]) -> str:
    """Compare an optimizer with and without the correction at the hardest level that both reached."""
    cost = methods[name]["seconds_per_epoch"] / methods[base]["seconds_per_epoch"]
    text = f"{name} against {base}: an epoch costs {cost:.2f} times as much"
    both = [i for i in range(len(levels)) if methods[name]["reached"][i] and methods[base]["reached"][i]]
    if not both:
        return f"{text}; none of the levels was reached by both."
    mine, other = methods[name]["reached"][both[-1]], methods[base]["reached"][both[-1]]
    at = f"{100 * levels[both[-1]]:g} %"
    epochs, seconds = _compare(mine["epochs"], other["epochs"]), _compare(mine["seconds"], other["seconds"])
    return (
        f"{text}; it reaches {at} in {mine['epochs']} against {other['epochs']} epochs ({epochs}) "
        f"and in {mine['seconds']:.2f} against {other['seconds']:.2f} s ({seconds})."
    )


def _compare(mine: float, other: float) -> str:
    ratio = other / max(mine, 1e-9)
    if 0.95 < ratio < 1.05:
        return "a tie"
    return f"{ratio:.1f} times faster" if ratio > 1 else f"{1 / ratio:.1f} times slower, it loses here"


def _noise(report: dict[str, Any], best: dict[str, Any]) -> str:
    count = report["data"]["test_images"]
    p = best["final_test_error"]["mean"]
    deviation = (max(p, 1 / count) * (1 - p) / count) ** 0.5
    return f"One standard deviation of chance with {count:,} test images: {100 * deviation:.2f} %."
