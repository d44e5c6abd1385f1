"""Makes the tables and plots of the comparison from the JSON lines."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks import markdown
from benchmarks.peers.ablations import BEST_RATE, SAME_RATE, SGD_ONLY, VARIANT_PEERS, VARIANT_PHASE, table
from benchmarks.peers.cost import MODELS
from benchmarks.peers.optimizers import PEERS
from benchmarks.peers.tasks import TASKS, VARIANTS

STYLES = {1: "--", 2: ":", 3: "-"}  # by Peer.order


def final_runs(runs: list[dict], peer: str) -> list[dict]:
    """Return the final runs of an optimizer that have the most steps, failed ones included."""
    found = [run for run in runs if run["optimizer"] == peer and run["phase"] == "final"]
    return [run for run in found if run["steps"] == max(r["steps"] for r in found)]


def reach(run: dict, target: float) -> tuple[int, float] | None:
    """Return (steps, CPU seconds) of the first point of the curve at or below the target."""
    return next(
        ((step, seconds) for step, seconds, _, metric in run["curve"] if metric is not None and metric <= target), None
    )


def at_edge(runs: list[dict], peer: str) -> bool:
    """Whether the chosen rate is the first or last of those that did not fail in the trials."""
    chosen = final_runs(runs, peer)[0]["setting"]["lr"]
    rates = sorted({setting["lr"] for setting in PEERS[peer].trials})
    return chosen in (rates[0], rates[-1])


def summary(runs: list[dict], task: str, peer: str) -> dict | None:
    """Return one row: setting, final metric of each seed, mean steps and seconds to every target, ms per step."""
    found = final_runs(runs, peer)
    if not found:
        return None
    ends = [run["curve"][-1][3] for run in found if not run["failure"]]
    targets = []
    for target in TASKS[task].targets:
        points = [point for run in found if (point := reach(run, target))]
        complete = len(points) == len(found)
        steps = statistics.mean(p[0] for p in points) if complete else None
        seconds = statistics.mean(p[1] for p in points) if complete else None
        targets.append({"target": target, "reached": len(points), "steps": steps, "seconds": seconds})
    return {
        "setting": found[0]["setting"],
        "seeds": len(found),
        "failed": len(found) - len(ends),
        "end": statistics.mean(ends) if ends else None,
        "spread": (min(ends), max(ends)) if ends else None,
        "targets": targets,
        "ms_per_step": statistics.median(run["ms_per_step"] for run in found),
        "edge": at_edge(runs, peer),
    }


def number(value: float | None, digits: int = 3) -> str:
    """Format ``value`` with ``digits`` significant digits and without an exponent."""
    if value is None:
        return "-"
    return f"{value:.{max(0, digits - len(str(int(abs(value)))) if abs(value) >= 1 else digits)}f}"


def finals(runs: list[dict], task: str) -> str:
    """Return the markdown table of one task, best metric first."""
    rows = {peer: row for peer in PEERS if (row := summary(runs, task, peer))}
    hopeless = [peer for peer in PEERS if all_failed(runs, peer)]
    order = sorted(rows, key=lambda peer: (rows[peer]["end"] is None, rows[peer]["end"]))
    heads = [f"steps (CPU s) to {target:g}" for target in TASKS[task].targets]
    lines = []
    for peer in order:
        row = rows[peer]
        rate = f"{row['setting']['lr']:g}" + (" *" if row["edge"] else "")
        if "damping" in row["setting"]:
            rate += f", damping {row['setting']['damping']:g}"
        end = "failed" if row["end"] is None else f"{number(row['end'])} ± {number(_half(row['spread']))}"
        if row["failed"] and row["end"] is not None:
            end += f", {row['failed']} of {row['seeds']} failed"
        cells = [rate, end, *(_reached(t, row["seeds"]) for t in row["targets"]), number(row["ms_per_step"])]
        lines.append([_name(peer), *cells])
    for peer in hopeless:
        lines.append([PEERS[peer].text, "", "every trial failed", *[""] * (1 + len(heads))])
    return markdown.table(["optimizer", "rate", f"{TASKS[task].metric} at the end", *heads, "ms per step"], lines)


def _name(peer: str) -> str:
    return f"**{PEERS[peer].text}**" if PEERS[peer].order == 3 else PEERS[peer].text


def all_failed(runs: list[dict], peer: str) -> bool:
    """Whether the optimizer had its trials and all of them failed."""
    trials = [run for run in runs if run["optimizer"] == peer and run["phase"] == "trial"]
    return len(trials) >= len(PEERS[peer].trials) and all(run["failure"] for run in trials)


def _half(spread: tuple[float, float]) -> float:
    return (spread[1] - spread[0]) / 2


def _reached(target: dict, seeds: int) -> str:
    if target["steps"] is None:
        return f"{target['reached']} of {seeds} seeds" if target["reached"] else "-"
    return f"{target['steps']:.0f} ({target['seconds']:.1f})"


def plot(runs: list[dict], task: str, path: Path) -> None:
    """Plot the metric (mean of the seeds) against steps and against CPU seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    colours = ("C0", "C1", "C3", "C2", "C4", "C5", "C6", "C7", "C8", "C9", "black", "navy")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    shown = [peer for peer in PEERS if any(not run["failure"] for run in final_runs(runs, peer))]
    bases = list(dict.fromkeys(peer.removesuffix("+pre") for peer in PEERS))
    lowest = []
    for peer in shown:
        curves = [run["curve"] for run in final_runs(runs, peer) if not run["failure"]]
        steps = [point[0] for point in curves[0]]
        mean = [statistics.mean(curve[k][3] for curve in curves) for k in range(len(steps))]
        seconds = [statistics.mean(curve[k][1] for curve in curves) for k in range(len(steps))]
        kind = PEERS[peer].order
        options = dict(
            color=colours[bases.index(peer.removesuffix("+pre")) % len(colours)], linestyle=STYLES[kind], label=peer
        )
        options["linewidth"] = 2.2 if kind == 3 else 1.3
        axes[0].plot(steps, mean, **options)
        axes[1].plot(seconds[1:], mean[1:], **options)
        lowest.append(min(mean))
    for axis, label in zip(axes, ("steps", "CPU seconds of one thread"), strict=True):
        for target in TASKS[task].targets:
            axis.axhline(target, color="grey", linewidth=0.6)
        axis.set(xlabel=label, yscale="log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:.3g}")
        axis.grid(alpha=0.25, which="both")
    start = final_runs(runs, shown[0])[0]["curve"][0][3]
    axes[0].set(ylabel=TASKS[task].metric, ylim=(0.9 * min(lowest), min(start, 12 * min(lowest))))
    axes[1].set_xscale("log")
    axes[1].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[1].xaxis.set_minor_formatter(ticker.NullFormatter())
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", ncol=7, loc="outside lower center")
    figure.suptitle(f"{task}: mean of {len(final_runs(runs, shown[0]))} seeds, each optimizer at its best trial")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


SHOWN = {  # peer: (name in the figure, colour), in the order of the bars
    "sgd": ("SGD", "C0"),
    "adamw": ("AdamW", "C1"),
    "muon": ("Muon", "C2"),
    "sgd+pre": ("SGD + correction", "C0"),
    "adamw+pre": ("AdamW + correction", "C1"),
    "muon+pre": ("Muon + correction", "C2"),
    "soap": ("SOAP", "grey"),
    "kfac": ("K-FAC", "black"),
}


def summary_plot(runs: list[dict], task: str, costs: dict, model: str, path: Path) -> None:
    """Plot the metric against steps, and the time of a step over that of SGD."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(9.2, 4), layout="constrained")
    ratios = {row["optimizer"]: row["ratio"] for row in costs["rows"] if row["model"] == model}
    for peer, (text, colour) in SHOWN.items():
        found = [run["curve"] for run in final_runs(runs, peer)]
        mean = [statistics.mean(point[3] for point in points) for points in zip(*found, strict=True)]
        style = dict(
            color=colour, linewidth=2.2 if PEERS[peer].order == 3 else 1.2, linestyle=STYLES[PEERS[peer].order]
        )
        curves.plot([point[0] for point in found[0]], mean, label=text, **style)
    curves.set(xlabel="steps", ylabel=f"{TASKS[task].metric}, {task}", yscale="log")
    curves.yaxis.set_major_formatter("{x:g}")
    curves.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if round(100 * value) in (5, 20, 50) else "")
    curves.grid(alpha=0.25, which="both")
    figure.legend(*curves.get_legend_handles_labels(), fontsize="small", ncol=4, loc="outside lower center")
    names = [peer for peer in SHOWN if peer in ratios]
    colours = [SHOWN[peer][1] for peer in names]
    faces = [colour if PEERS[peer].order == 3 else "white" for peer, colour in zip(names, colours, strict=True)]
    drawn = bars.barh([SHOWN[peer][0] for peer in names], [ratios[peer] for peer in names], color=faces)
    for bar, colour in zip(drawn, colours, strict=True):
        bar.set_edgecolor(colour)
    bars.bar_label(drawn, fmt="%.2f", padding=3, fontsize="small")
    bars.invert_yaxis()
    bars.margins(x=0.12)
    bars.set(xlabel="CPU time of a step, SGD's = 1", title=f"{model}: what a step costs")
    seeds = len(final_runs(runs, next(iter(SHOWN))))
    curves.set_title(f"{task}: mean of {seeds} seeds, each at its best trial")
    for axis in (curves, bars):
        axis.title.set_fontsize("medium")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def overview(runs: dict[str, list[dict]]) -> str:
    """Return a table of steps (CPU seconds) to the hardest target that an optimizer reaches with every seed.

    For an optimizer that does not reach it the table has the metric at the end.
    """
    tasks = [task for task in TASKS if runs.get(task)]
    rows = {task: {peer: row for peer in PEERS if (row := summary(runs[task], task, peer))} for task in tasks}
    chosen = {
        task: max(
            (i for i in range(len(TASKS[task].targets)) if any(r["targets"][i]["steps"] for r in rows[task].values())),
            default=0,
        )
        for task in tasks
    }
    heads = [f"{task}, {TASKS[task].metric} {TASKS[task].targets[chosen[task]]:g}" for task in tasks]
    lines = []
    for peer in PEERS:
        cells = [_overview_cell(runs[task], rows[task].get(peer), chosen[task], peer) for task in tasks]
        if set(cells) != {"not run"}:
            lines.append([_name(peer), *cells])
    return markdown.table(["optimizer", *heads], lines)


def _overview_cell(runs: list[dict], row: dict | None, target: int, peer: str) -> str:
    if row is None:
        return "every trial failed" if all_failed(runs, peer) else "not run"
    if row["targets"][target]["steps"] is None:
        if row["end"] is None:
            return "failed"
        failed = f", {row['failed']} of {row['seeds']} failed" if row["failed"] else ""
        return f"ends at {number(row['end'])}{failed}"
    return _reached(row["targets"][target], row["seeds"])


def cost(results: dict) -> str:
    """Return a table: time of a step over SGD's and, in brackets, bytes that are kept for each parameter."""
    rows = results["rows"]
    models = [model for model in MODELS if any(row["model"] == model for row in rows)]
    sgd = {row["model"]: row["ms"] for row in rows if row["optimizer"] == "sgd"}
    lines = [["SGD, momentum 0.9: ms per step", *(number(sgd[model]) for model in models)]]
    for peer in PEERS:
        found = {row["model"]: row for row in rows if row["optimizer"] == peer}
        if peer == "sgd" or not found:
            continue
        cells = [
            f"{found[m]['ratio']:.2f} ({4 * found[m]['memory']:.1f})"  # stored over the parameters, in float32
            if m in found
            else "fails"
            if f"{m}, {peer}" in results["failures"]
            else "not run"
            for m in models
        ]
        lines.append([_name(peer), *cells])
    return markdown.table(["a step, ratio to SGD (bytes a parameter)", *models], lines)


def ablations(runs: list[dict]) -> str:
    """Return a table with one row per change and one column per task and base optimizer."""
    found = table([run for run in runs if run["phase"] != VARIANT_PHASE])
    columns = list(dict.fromkeys(column for cells in found.values() for column in cells))
    order = {change: i for i, change in enumerate([*SAME_RATE, *BEST_RATE, *SGD_ONLY])}
    rows = [
        [change, *(_cell(cells, column) for column in columns)]
        for change, cells in sorted(found.items(), key=lambda pair: order.get(pair[0], len(order)))
    ]
    return markdown.table(["change", *columns], rows)


def variants(runs: list[dict]) -> str:
    """Return a table of activations and normalisations, with and without the correction, one row per network."""
    found = table([run for run in runs if run["phase"] == VARIANT_PHASE]).get(VARIANT_PHASE, {})
    rows = []
    for task in VARIANTS:
        cells = [_cell(found, f"{task}, {peer}") for peer in VARIANT_PEERS]
        if any(cells):
            rows.append([task, *cells])
    return markdown.table(["network", *map(_name, VARIANT_PEERS)], rows)


def _cell(cells: dict[str, tuple[float, float] | None], column: str) -> str:
    if column not in cells:
        return ""
    value = cells[column]
    return "diverges" if value is None else f"{number(value[0])} ± {number(value[1])}"
