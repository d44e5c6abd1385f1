"""Gradient energy: how much of the residual arrives at each layer (arXiv 1708.00631, gradient energy distribution)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .recorder import Layers, Point, Recorder, weighted
from .results import Result, figure, log_scale, over_layers, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerEnergy(Result):
    """Gradient energy of one layer, one entry per point; NaN where no gradient arrived."""

    name: str
    kind: str
    energy: list[float]  #: mean over samples and units of (d loss / d y)^2
    norm: list[float]  #: mean over samples of the l2 norm of d loss / d y


@dataclass(frozen=True)
class GradientEnergy(Result):
    """Layers in the order of their first call, from input to output."""

    steps: list[int]  #: forward passes before the point
    layers: list[LayerEnergy]

    def decades(self, point: int = -1) -> float:
        """Return log10 of the last layer's energy over the first's; above 0 the gradient is lost towards the input."""
        last, first = (self.layers[i].energy[point] for i in (-1, 0))
        if not (last > 0 and first > 0):
            return math.inf if last > 0 and first == 0 else math.nan
        return math.log10(last) - math.log10(first)

    def plot(self) -> Figure:
        """Plot energy against layer on a log scale, one line per point (light: early, dark: late)."""
        made, (axis,) = figure(1, width=6.5)
        chosen = sorted({round(i * (len(self.steps) - 1) / 7) for i in range(8)})
        for i in chosen:
            shade = 0.75 * (1 - (i + 1) / len(self.steps))
            colour = (shade, shade + 0.1 * (1 - shade), 0.45 + 0.55 * shade)
            names, values = [layer.name for layer in self.layers], [layer.energy[i] for layer in self.layers]
            series(axis, names, values, colour, f"step {self.steps[i]}")
        log_scale(axis)
        axis.set_ylabel("mean squared gradient")
        axis.set_title("Gradient energy, from input (left) to output", fontsize=10)
        over_layers(axis, [layer.name for layer in self.layers])
        if len(chosen) > 1:
            axis.legend(fontsize=8, frameon=False)
        return made


class GradientEnergyRecorder(Recorder):
    """The recorder that :func:`gradient_energy` returns."""

    what = "gradient_energy"

    def _forward(self, point: Point, index: int, module: nn.Module, x: Tensor | None, output: Tensor) -> None:
        pass

    def _backward(self, point: Point, index: int, gradient: Tensor) -> None:
        squares = gradient.float().square()
        samples = max(1, len(gradient)) if gradient.dim() else 1
        norms = squares.reshape(samples, -1).sum(1).sqrt().sum()
        point.add(index, "squares", squares.sum(dtype=torch.float64), gradient.numel())
        point.add(index, "norms", norms.double(), samples)

    def result(self) -> GradientEnergy:
        layers = [
            LayerEnergy(self.names[i], self.kinds[i], self._means(i, "squares"), self._means(i, "norms"))
            for i in self._seen()
        ]
        return GradientEnergy([point.step for point in self.points], layers)

    def _means(self, layer: int, name: str) -> list[float]:
        return [
            math.nan if pair is None or not pair[1] else pair[0].item() / pair[1] for pair in self._series(layer, name)
        ]


def gradient_energy(
    model: nn.Module, *, layers: Layers = None, every: int = 1, average: int = 1
) -> GradientEnergyRecorder:
    """Attach a recorder of E_l = mean (d loss / d y_l)^2 of every weight layer's output y_l.

    If the energy falls from the input to the output, depth reduces the error; if it falls from the output to the input,
    the gradient loses information (arXiv 1708.00631).
    The gradient is that of the loss that ``backward()`` was called on, so with a mean over the batch it is 1/batch of
    the residual of the paper.

    Args:
        model, layers, every, average: see :class:`~consistency_ops.analysis.Recorder`; by default all layers with
            weights. ``average=len(loader)`` makes one point per epoch.

    Example::

        with co.analysis.gradient_energy(model) as monitor:
            train_one_epoch(model)
        monitor.result().plot().savefig("energy.png")
    """
    return GradientEnergyRecorder(model, layers, every, average, weighted)
