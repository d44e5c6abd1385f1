"""Statistics of activations and gradients of every layer over time (Glorot and Bengio, AISTATS 2010)."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..reference import sample_rows
from .recorder import Layers, Point, Recorder, signalling
from .results import COLOURS, Result, figure, log_scale, over_layers, series
from .saturation import is_activation, saturated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 64  # between -RANGE and RANGE times the root mean square; two more bins take the values outside
RANGE = 4.0
_SAMPLES = 4096  # values per layer that quantile and histogram use


@dataclass(frozen=True)
class Histogram(Result):
    """Relative frequencies of values divided by their root mean square; the first and last bin are open."""

    edges: list[float]  #: inner edges in units of the root mean square, from -4 to 4
    frequencies: list[list[float]]  #: one list per point, with len(edges) + 1 entries


@dataclass(frozen=True)
class LayerStatistics(Result):
    """Statistics of one layer. Every list has one entry per point: NaN where it was not recorded or has no meaning."""

    name: str
    kind: str
    mean: list[float]
    std: list[float]
    rms: list[float]
    percentile: list[float]  #: 98th percentile of the values
    saturation: list[float]  #: share of values at which the activation's slope is below 5 % of its largest
    dead: list[float]  #: share of units that were 0 for every sample of the point
    gradient_mean: list[float]
    gradient_std: list[float]
    gradient_rms: list[float]
    histogram: Histogram
    gradient_histogram: Histogram
    rows: list[int] = field(default_factory=list)  #: values of one unit that each point used, for ``dead``


@dataclass(frozen=True)
class ActivationStatistics(Result):
    """The statistics of all layers, in the order of their first call.

    ``jacobian`` has, for every layer i, the mean singular value of d z_{i+1} / d z_i at each probe; ``probe_steps`` has
    the number of passes before each probe.
    """

    steps: list[int]
    layers: list[LayerStatistics]
    jacobian: list[dict[str, float]] = field(default_factory=list)
    probe_steps: list[int] = field(default_factory=list)

    def plot(self) -> Figure:
        """Plot standard deviations of activations and gradients, and saturated shares, against the layers."""
        flat = any(not math.isnan(value) for layer in self.layers for value in layer.saturation)
        made, axes = figure(3 if flat else 2, width=4.6)
        names = [layer.name for layer in self.layers]
        ends = {0: "first point", -1: "last point"} if len(self.steps) > 1 else {-1: "at this point"}
        panels = (("std", "activations, standard deviation"), ("gradient_std", "gradients, standard deviation"))
        for axis, (key, title) in zip(axes, panels, strict=False):
            for colour, (i, label) in zip(COLOURS, ends.items(), strict=False):
                series(axis, names, [getattr(layer, key)[i] for layer in self.layers], colour, label)
            log_scale(axis)
            axis.set_title(title, fontsize=10)
        if flat:
            for colour, (i, label) in zip(COLOURS, ends.items(), strict=False):
                values = [layer.saturation[i] for layer in self.layers]
                axes[2].plot(values, color=colour, marker="o", ls="", label=label)
            axes[2].set_ylim(-0.03, 1.03)
            axes[2].set_title("saturated share", fontsize=10)
        for axis in axes:
            over_layers(axis, names)
        axes[0].legend(fontsize=8, frameon=False)
        return made

    def plot_histograms(self, point: int = -1, most: int = 8) -> Figure:
        """Plot densities of activations and gradients in units of their root mean square, one line per layer."""
        made, axes = figure(2, width=5.6)
        step = -(-len(self.layers) // most)
        panels = (("histogram", "activations"), ("gradient_histogram", "gradients"))
        for axis, (key, title) in zip(axes, panels, strict=True):
            for i, layer in enumerate(self.layers[::step]):
                frequencies = getattr(layer, key).frequencies[point]
                if frequencies:
                    edges = getattr(layer, key).edges
                    width = edges[1] - edges[0]
                    shade = 0.8 * i * step / max(1, len(self.layers))
                    density = [f / width for f in frequencies[1:-1]]  # the open bins have no width
                    axis.stairs(density, edges, color=(shade, 0.2 + 0.5 * shade, 0.7), label=layer.name)
            axis.set_title(f"{title} / root mean square", fontsize=10)
            axis.set_yscale("log")
            axis.set_ylim(1e-3, None)
        axes[0].legend(fontsize=8, frameon=False)
        return made


def _moments(x: Tensor) -> Tensor:
    """Return the sum and the sum of squares, in float64."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.stack([x.sum(dtype=torch.float64), x.square().sum(dtype=torch.float64)])


def _sample(x: Tensor) -> Tensor:
    """Return at most _SAMPLES values, one drawn of every block of all, in float32 or wider.

    A fixed distance between them would meet the same units in every sample wherever it is a multiple of their number.
    """
    flat = x.reshape(-1)
    if len(flat) > _SAMPLES:
        flat = flat[sample_rows(len(flat), _SAMPLES, device=x.device)]
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat


def _edges(device: torch.device | None = None) -> Tensor:
    """Return the inner edges of the bins, made on the device: a copy from the host would wait for it."""
    return torch.linspace(-RANGE, RANGE, BINS + 1, device=device)


def _histogram(values: Tensor) -> Tensor:
    """Count ``values / rms`` between the edges without waiting for the device."""
    rms = values.square().mean().sqrt().clamp(min=torch.finfo(values.dtype).tiny)
    bins = torch.bucketize(values / rms, _edges(values.device).to(values.dtype), right=True)
    counts = torch.zeros(BINS + 2, dtype=torch.float64, device=values.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))


def _alive(output: Tensor) -> Tensor:
    """Return which units were not 0 for every sample. Units: channels of (N, C, H, W, ...), else the last dimension."""
    units = 1 if output.dim() > 3 else output.dim() - 1
    return (output != 0).movedim(units, -1).reshape(-1, output.shape[units]).any(0)


def _mean_std_rms(pair: tuple[Tensor, int] | None) -> tuple[float, float, float]:
    if pair is None:
        return (math.nan,) * 3
    mean, square = (pair[0] / pair[1]).tolist()
    return mean, math.sqrt(max(0.0, square - mean * mean)), math.sqrt(square)


def _dead(sums: dict[str, Tensor]) -> float:
    alive = [value for name, value in sums.items() if name.startswith("alive")]
    return 1 - float(torch.cat(alive).double().mean()) if alive else math.nan


class ActivationRecorder(Recorder):
    """The recorder that :func:`activation_statistics` returns."""

    what = "activation_statistics"

    def __init__(self, model: nn.Module, layers: Layers, every: int, average: int) -> None:
        super().__init__(model, layers, every, average, signalling)
        self._model = weakref.ref(model)
        self._probes: list[tuple[int, dict[str, float]]] = []

    def clear(self) -> None:
        super().clear()
        self._probes.clear()

    def probe(self, *inputs: Tensor, samples: int = 8) -> dict[str, float]:
        """Return mean singular values of d z_{i+1} / d z_i at ``inputs`` by the name of layer i; keep them as a probe.

        The z are the outputs of the recorded activations (of all recorded layers if there are none); z_0 is the input.
        This is equation 17 of Glorot and Bengio, near 0.8 in a healthy tanh network. It costs passes of the model, see
        :func:`~consistency_ops.analysis.propagation`; the model is unchanged.
        """
        from .propagation import propagation

        model = self._model()
        if model is None:
            raise RuntimeError("activation_statistics: probe: the model no longer exists")
        modules = dict(model.named_modules())
        names = [name for name in self.names if name in modules and is_activation(modules[name])] or self.names
        found = propagation(model, *inputs, layers=names, to="next", samples=samples)
        values = {block.start: block.mean_singular_value for block in found.blocks}
        self._probes.append((self.forwards, values))
        return values

    def _forward(self, point: Point, index: int, module: nn.Module, x: Tensor | None, output: Tensor) -> None:
        if not output.numel():
            return
        point.add(index, "moments", _moments(output), output.numel())
        flat = _sample(output)
        point.add(index, "percentile", flat.kthvalue(math.ceil(0.98 * len(flat))).values.double())
        point.add(index, "histogram", _histogram(flat))
        blocked = saturated(module, x, output)
        if blocked is not None:
            point.add(index, "saturation", blocked.sum(dtype=torch.float64), output.numel())
        if output.dim() > 1:
            alive = _alive(output)
            point.add(index, f"alive {len(alive)}", alive)  # a shared module may see several widths
            point.counts[index]["rows"] = point.counts[index].get("rows", 0) + output.numel() // max(1, len(alive))

    def _backward(self, point: Point, index: int, gradient: Tensor) -> None:
        if gradient.numel():
            point.add(index, "gradient_moments", _moments(gradient), gradient.numel())
            point.add(index, "gradient_histogram", _histogram(_sample(gradient)))

    def _layer(self, i: int) -> LayerStatistics:
        columns: dict[str, list[float]] = {}
        for prefix in ("", "gradient_"):
            rows = [_mean_std_rms(pair) for pair in self._series(i, f"{prefix}moments")]
            for name, column in zip(("mean", "std", "rms"), zip(*rows, strict=True), strict=True):
                columns[prefix + name] = list(column)
        for name in ("percentile", "saturation"):
            columns[name] = [math.nan if pair is None else pair[0].item() / pair[1] for pair in self._series(i, name)]
        columns["dead"] = [_dead(point.sums[i]) for point in self.points]
        histograms = {
            name: Histogram(
                _edges().tolist(),
                [[] if pair is None else (pair[0] / pair[0].sum()).tolist() for pair in self._series(i, name)],
            )
            for name in ("histogram", "gradient_histogram")
        }
        counts = [point.counts[i].get("rows", 0) for point in self.points]
        fields: dict[str, Any] = {**columns, **histograms, "rows": counts}
        return LayerStatistics(self.names[i], self.kinds[i], **fields)

    def result(self) -> ActivationStatistics:
        layers = [self._layer(i) for i in self._seen()]
        steps = [point.step for point in self.points]
        return ActivationStatistics(steps, layers, [v for _, v in self._probes], [s for s, _ in self._probes])


def activation_statistics(
    model: nn.Module, *, layers: Layers = None, every: int = 1, average: int = 1
) -> ActivationRecorder:
    """Attach a recorder of mean, standard deviation, 98th percentile, saturation and histogram of every layer's output,
    and of the gradient that arrives there (Glorot and Bengio, AISTATS 2010).

    Nothing waits for the device until ``result()``. Quantile and histogram use at most 4096 values of a layer, evenly
    spread, and several passes pooled into a point average their quantiles; all else is exact.

    Args:
        model, layers, every, average: see :class:`~consistency_ops.analysis.Recorder`; by default every module without
            children, except for dropout, pooling and reshaping.

    Example::

        monitor = co.analysis.activation_statistics(model, every=100)
        train(model)
        monitor.probe(inputs)                 # mean singular values of the layers' Jacobians, when wanted
        monitor.result().plot().savefig("activations.png")
        monitor.detach()
    """
    return ActivationRecorder(model, layers, every, average)
