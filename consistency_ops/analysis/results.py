"""Shared by the dataclasses of results: conversion to plain Python, and plots (matplotlib is imported only then)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .roles import role

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour = str | tuple[float, float, float]

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")


def plain(value: Any) -> Any:
    """Convert to what ``json.dumps(..., allow_nan=False)`` takes; NaN and Inf become None."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Result:
    """Base of the dataclasses that a monitor returns."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain lists and numbers; what is not finite becomes None."""
        fields: dict[str, Any] = plain(self)
        return fields


def figure(columns: int, width: float = 5.2, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """Return a figure with one row of axes; the user's matplotlib state is not touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot() needs matplotlib; install it with: pip install matplotlib") from None
    made = Figure(figsize=(width * columns, height), dpi=110, layout="constrained", facecolor="white")
    axes = made.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return made, list(axes)


def over_layers(axis: Axes, names: list[str]) -> None:
    """Write layer names on the x axis, at most 14 of them."""
    step = max(1, -(-len(names) // 14))
    axis.set_xticks(range(0, len(names), step), shortened(names)[::step], rotation=45, ha="right", fontsize=8)
    axis.set_xlim(-0.5, len(names) - 0.5)


def shortened(names: list[str], most: int = 22) -> list[str]:
    """Names without the beginning that all have in common, and of long ones the end."""
    parts = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(len(p) > common + 1 and p[: common + 1] == parts[0][: common + 1] for p in parts):
        common += 1
    short = [".".join(p[common:]) for p in parts]
    return [_end(name, most) for name in short]


def _end(name: str, most: int) -> str:
    """Of a long name the last components, and the number of the block: ``…9…attention.output.dense``."""
    if len(name) <= most:
        return name
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    fits = next((i for i in (*numbers, len(parts) - 1) if len(".".join(parts[i:])) < most), None)
    if fits is not None and (fits in numbers or not numbers):
        return "…" + ".".join(parts[fits:])
    block = numbers[-1] if numbers else 0
    first = f"…{parts[block]}…" if numbers else "…"
    last = len(parts) - 1
    while last > block + 1 and len(first) + len(".".join(parts[last - 1 :])) <= most:
        last -= 1
    return first + ".".join(parts[last:])


def series(axis: Axes, names: list[str], values: list[float], colour: Colour, label: str) -> None:
    """Draw a value for every layer. In a network of many layers lines join those of one role only: a line from every
    layer to the next would jump up and down between projections, convolutions and heads.
    """
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(role(name), []).append(i)
    if len(names) <= 20 or len(groups) == 1:
        axis.plot(values, color=colour, marker=".", label=label)
        return
    axis.plot(values, color=colour, marker=".", ls="", label=label)
    for members in groups.values():
        if len(members) > 1:
            axis.plot(members, [values[i] for i in members], color=colour, alpha=0.3, linewidth=0.8)


def log_scale(axis: Axes) -> None:
    """Make the y axis logarithmic if anything that was drawn is positive; call it after drawing."""
    if any((np.asarray(line.get_ydata()) > 0).any() for line in axis.get_lines()):
        axis.set_yscale("log")
