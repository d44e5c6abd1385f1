"""Weight domination (Huang et al. 2020): layers whose gradient is too small to move their weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .operator_norm import gram_bound
from .recorder import Layers, Point, Recorder, _Hook, weighted
from .results import COLOURS, Result, figure, log_scale, over_layers, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOMINATED = 1e-5  # the paper says "much smaller" and gives no number; this is a judgement


@dataclass(frozen=True)
class LayerDomination(Result):
    """Singular values of one layer, one entry per point; NaN if it has no weight of its own, or no gradient arrived."""

    name: str
    kind: str
    weight: list[float]  #: sigma_max(W)
    gradient: list[float]  #: sigma_max(d loss / d W)

    def ratio(self, point: int = -1) -> float:
        """Return sigma_max(d loss / d W) / sigma_max(W): a gradient step changes W by about the rate times this."""
        weight, gradient = self.weight[point], self.gradient[point]
        if weight == 0:
            return math.inf if gradient > 0 else math.nan
        return gradient / weight


@dataclass(frozen=True)
class WeightDomination(Result):
    """Layers in the order of their first call, from input to output."""

    steps: list[int]  #: forward passes before the point
    layers: list[LayerDomination]

    def dominated(self, threshold: float = DOMINATED, point: int = -1) -> list[str]:
        """Return the names of the layers whose ratio is below ``threshold``."""
        return [layer.name for layer in self.layers if layer.ratio(point) < threshold]

    def plot(self) -> Figure:
        """Plot both singular values at the last point against the layers, and the ratio over time if there are more."""
        made, axes = figure(2 if len(self.steps) > 1 else 1, width=6.5)
        names = [layer.name for layer in self.layers]
        for colour, key, label in zip(
            COLOURS, ("weight", "gradient"), ("of the weight", "of its gradient"), strict=False
        ):
            series(axes[0], names, [getattr(layer, key)[-1] for layer in self.layers], colour, label)
        log_scale(axes[0])
        axes[0].set_ylabel("largest singular value")
        axes[0].set_title("A weight far above its gradient hardly moves", fontsize=10)
        over_layers(axes[0], names)
        axes[0].legend(fontsize=8, frameon=False)
        if len(self.steps) > 1:
            chosen = sorted({round(i * (len(names) - 1) / 5) for i in range(6)})
            for colour, i in zip(COLOURS, chosen, strict=False):
                ratios = [self.layers[i].ratio(point) for point in range(len(self.steps))]
                axes[1].plot(self.steps, ratios, ".-", color=colour, label=names[i])
            log_scale(axes[1])
            axes[1].axhline(DOMINATED, color="grey", linewidth=0.8, linestyle="--")
            axes[1].set_xlabel("step")
            axes[1].set_ylabel("gradient / weight")
            axes[1].set_title("Ratio over time; dashed: threshold", fontsize=10)
            axes[1].legend(fontsize=8, frameon=False)
        return made


def largest_singular_value(weight: Tensor) -> Tensor:
    """Return that of the weight as a matrix (first dimension, all others) without waiting for the device.

    Gram iteration gives an upper bound: at most 0.1 % too large for ranks up to 3600, and exactly 0 for zeros.
    """
    matrix = weight.flatten(1)
    matrix = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    scale = matrix.abs().amax()  # the iteration squares: gradients of 1e-25 must not vanish in it
    return scale.double() * gram_bound(matrix / scale.clamp(min=torch.finfo(matrix.dtype).tiny))


def power_iteration(weight: Tensor, vectors: int = 6, steps: int = 5) -> Tensor:
    """The same from below, some per cent too small: block power iteration from fixed random vectors.

    It takes 4 ``steps * vectors`` operations an element; those of the Gram iteration grow with the third power of the
    width.
    """
    matrix = weight.flatten(1)
    if min(matrix.shape) <= 64:
        return largest_singular_value(weight)
    matrix = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    scale = matrix.abs().amax()
    matrix = matrix / scale.clamp(min=torch.finfo(matrix.dtype).tiny)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(matrix.shape[1], vectors, generator=generator).to(matrix)
    for _ in range(steps):
        x = torch.linalg.qr(matrix.T @ (matrix @ x)).Q
    values: Tensor = torch.linalg.svdvals(matrix @ x)
    return scale.double() * values[0].double()


def _matrix_of(module: nn.Module) -> nn.Parameter | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and weight.dim() > 1 and weight.numel() else None


class WeightDominationRecorder(Recorder):
    """The recorder that :func:`weight_domination` returns."""

    what = "weight_domination"

    def __init__(self, model: nn.Module, layers: Layers, every: int, average: int) -> None:
        super().__init__(model, layers, every, average, weighted)
        self._hooked: dict[int, nn.Parameter] = {}
        self._pending: dict[int, Point] = {}  # layers whose gradient has not come yet
        self.rough: bool = False  #: some per cent too small, for a fraction of the time

    def detach(self) -> None:
        super().detach()
        self._hooked.clear()

    def _forward(self, point: Point, index: int, module: nn.Module, x: Tensor | None, output: Tensor) -> None:
        weight = _matrix_of(module)
        if weight is None:
            return
        point.add(index, "weight", self._norm(weight.detach()))
        if weight.requires_grad:
            self._pending[index] = point
            if self._hooked.get(index) is not weight:
                self._hooked[index] = weight
                handle = weight.register_hook(  # type: ignore[no-untyped-call]  # torch does not annotate it
                    _Hook(self._arrived, index)
                )
                self._handles.append(handle)

    def _norm(self, matrix: Tensor) -> Tensor:
        return power_iteration(matrix) if self.rough else largest_singular_value(matrix)

    def _backward(self, point: Point, index: int, gradient: Tensor) -> None:
        pass

    def _arrived(self, index: int, gradient: Tensor) -> None:
        point = self._pending.pop(index, None)
        if point is not None:
            with torch.no_grad():
                point.add(index, "gradient", self._norm(gradient.detach()))

    def result(self) -> WeightDomination:
        layers = [
            LayerDomination(self.names[i], self.kinds[i], self._means(i, "weight"), self._means(i, "gradient"))
            for i in self._seen()
        ]
        return WeightDomination([point.step for point in self.points], layers)

    def _means(self, layer: int, name: str) -> list[float]:
        return [math.nan if pair is None else pair[0].item() / pair[1] for pair in self._series(layer, name)]


def weight_domination(
    model: nn.Module, *, layers: Layers = None, every: int = 1, average: int = 1
) -> WeightDominationRecorder:
    """Attach a recorder of sigma_max(W) and sigma_max(d loss / d W) of every weight layer.

    A layer whose gradient is far smaller than its weight is dominated by it: updates no longer change the layer, and
    training looks as if it had reached a minimum (Huang et al., ECCV 2020, arXiv 2002.10801, "weight domination").
    Kernels of convolutions count as matrices of (out, in x taps); values are at most 0.1 % too large (Gram iteration).

    The gradient is that of the parameter in the next backward pass, before it is added to ``.grad``. It includes a loss
    scale, is this rank's own in data parallel training, and is the sum over all layers that share the weight. A
    recorded pass costs about 28 products of the smaller Gram matrix per layer; it does not wait for the device.

    Args:
        model, layers, every, average: see :class:`~consistency_ops.analysis.Recorder`; by default all layers with
            weights. A layer whose weight is computed (parametrised) gives NaN.

    Example::

        with co.analysis.weight_domination(model, every=100) as monitor:
            train_one_epoch(model)
        print(monitor.result().dominated())
    """
    return WeightDominationRecorder(model, layers, every, average)
