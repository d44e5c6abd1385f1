"""Draws ``report.png``: loss and test error against epochs and against seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .files import write_whole
from .results import complete, curves, threads_text

# Okabe and Ito's colours, which colour-blind readers tell apart: one per optimizer. Lines are solid with the correction
# and dashed without it, so that a print in grey can be read, too.
_COLOURS = {"sgd": "#0072B2", "adam": "#D55E00", "adamw": "#CC79A7", "sgd2": "#009E73"}
_GREY = "#555555"
_FLOOR = 1e-4  # an error of 0 has no logarithm
_LABEL_GAP = 0.058  # smallest distance of two labels, as a share of the height of the axis


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the curves of the report: lines are means over the seeds, bands reach from the lowest to the highest."""
    runs = complete(report["runs"])
    names = [name for name in report["summary"]["methods"] if curves(runs, name)["seconds"]]
    figure = Figure(figsize=(11.5, 8.2), dpi=130, facecolor="white")
    axes = figure.subplots(2, 2, sharey="row")
    figure.subplots_adjust(left=0.075, right=0.975, top=0.85, bottom=0.07, hspace=0.16, wspace=0.38)
    for row, field in enumerate(("train_loss", "test_error")):
        for column, against in enumerate(("epoch", "seconds")):
            axis: Axes = axes[row][column]
            ends = [_curve(axis, curves(runs, name), name, field, against) for name in names]
            _dress(axis, row, column, field)
            if column == 0:
                _label_ends(axis, names, ends)
    _mark_level(axes[1], report)
    _head(figure, axes[0][0], report, names)
    write_whole(path, lambda part: figure.savefig(part, format="png"))


def _colour(name: str) -> str:
    return _COLOURS[name.removesuffix("+pre")]


def _style(name: str) -> dict[str, Any]:
    corrected = name.endswith("+pre") or name == "sgd2"
    return {
        "color": _colour(name),
        "linestyle": "-" if corrected else (0, (4, 2)),
        "linewidth": 2.0 if corrected else 1.6,
    }


def _curve(axis: Axes, curve: dict[str, list[list[float]]], name: str, field: str, against: str) -> float:
    values = [[max(v, _FLOOR) for v in seeds] for seeds in curve[field]]
    means = [sum(seeds) / len(seeds) for seeds in values]
    seconds = [sum(seeds) / len(seeds) for seeds in curve["seconds"]]
    x = list(range(1, len(means) + 1)) if against == "epoch" else seconds
    axis.plot(x, means, label=name, marker="o" if len(x) == 1 else None, **_style(name))
    if len(values[0]) > 1:
        axis.fill_between(
            x, [min(s) for s in values], [max(s) for s in values], color=_colour(name), alpha=0.13, linewidth=0
        )
    return means[-1]


def _dress(axis: Axes, row: int, column: int, field: str) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %" if field == "test_error" else f"{v:g}"))
    axis.tick_params(labelleft=True, colors=_GREY)
    axis.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.01)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    if column == 0:
        axis.set_ylabel("training loss" if row == 0 else "test error", color="#222222")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    else:
        axis.set_xlim(left=0)
    if row == 1:
        axis.set_xlabel(
            "epoch" if column == 0 else "seconds of training (tests and rate search not counted)", color="#222222"
        )


def _label_ends(axis: Axes, names: list[str], ends: list[float]) -> None:
    """Write each method's name right of its curve, moved apart where curves end close together."""
    to_axis = axis.transScale + axis.transLimits
    axis.autoscale_view()
    heights = sorted((to_axis.transform((1.0, end))[1], name) for name, end in zip(names, ends, strict=True))
    placed: list[tuple[float, str]] = []
    for height, name in heights:
        placed.append((max(height, placed[-1][0] + _LABEL_GAP) if placed else max(height, 0.0), name))
    overflow = max(placed[-1][0] - 1.0, 0.0) if placed else 0.0
    for height, name in placed:
        axis.annotate(
            name,
            (1.015, height - overflow),
            xycoords="axes fraction",
            va="center",
            color=_colour(name),
            fontsize=10,
            fontweight="bold",
        )


def _mark_level(axes: list[Axes], report: dict[str, Any]) -> None:
    """Draw the level of the verdict, and a dot where each method first reached it."""
    levels, methods = report["summary"]["levels"], report["summary"]["methods"]
    index = report["summary"]["headline"]
    if index is None:
        return
    for axis, unit in zip(axes, ("epochs", "seconds"), strict=True):
        axis.axhline(levels[index], color=_GREY, linewidth=0.9, linestyle=":")
        for name, m in methods.items():
            if point := m["reached"][index]:
                style: dict[str, Any] = {"marker": "o", "markersize": 7, "markeredgecolor": "white", "zorder": 5}
                axis.plot([point[unit]], [point["test_error"]], color=_colour(name), **style)


def _head(figure: Figure, first: Axes, report: dict[str, Any], names: list[str]) -> None:
    """Write the title, the verdict, the settings and the legend."""
    config, data, machine = report["config"], report["data"], report["machine"]
    count = len({run["seed"] for run in complete(report["runs"])})
    seeds = f"{count} seeds (line: mean, band: lowest to highest)" if count > 1 else "1 seed"
    rates = ", ".join(f"{name} {report['summary']['methods'][name]['lr']:g}" for name in names)
    where = f"{machine['processor']}, {threads_text(report)}" if machine["device"] == "cpu" else machine["device"]
    unfinished = "" if report["status"] == "finished" else f" ({report['status']})"
    small: dict[str, Any] = {"fontsize": 9.5, "color": _GREY}
    figure.text(0.075, 0.958, f"{config['model']} on {data['name']}{unfinished}", fontsize=15, fontweight="bold")
    if report["summary"]["headline"] is not None:
        figure.text(0.075, 0.928, f"{report['summary']['verdict'][0].rstrip('.')} (dots).", fontsize=10.5)
    figure.text(
        0.075,
        0.904,
        f"{data['train_images']:,} training and {data['test_images']:,} test images, batch {config['batch_size']}, "
        f"{seeds}; same weights and batches for every method.",
        **small,
    )
    figure.text(0.075, 0.882, f"Learning rates: {rates}. Seconds on {where}.", **small)
    handles, labels = first.get_legend_handles_labels()
    if handles:
        place: dict[str, Any] = {
            "loc": "upper right",
            "bbox_to_anchor": (0.98, 1.0),
            "ncols": len(names) if len(names) < 5 else 4,
        }
        figure.legend(handles, labels, frameon=False, handlelength=2.8, **place)
