"""Layer-wise conditioning: spectra of the second moments of inputs and output gradients (Huang et al., ECCV 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..layers import layer_type
from ..ops.checks import check_integers, check_numbers, shown
from .recorder import Layers, Point, Recorder, weighted
from .results import COLOURS, Result, figure, log_scale, over_layers, series, shortened
from .second_moment import SecondMoment, chunks_of, unit_rows
from .time_limit import out_of_time, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPECTRA = ("input", "normalised", "preconditioned", "both", "gradient")
SMALLEST = 32  # units that stand for a wide layer at least, if there are few rows
RMS_EPS = 1e-2  # the default of BatchRMSNorm


def condition_number(spectrum: list[float], p: float = 1.0) -> float:
    """Return lambda_1 / lambda_ceil(p d) of the d eigenvalues in ``spectrum``; inf if the latter is 0 in float32.

    ``spectrum`` is in descending order; if it is empty or has NaN, the result is NaN.  ``p`` in (0, 1] is the share of
    the spectrum that counts.

    Raises:
        ValueError: ``p`` out of range. TypeError: ``p`` is not a number.
    """
    check_numbers("condition_number", p=p)
    if not 0 < p <= 1:
        raise ValueError(f"condition_number: p must be in (0, 1], got {p}")
    if not spectrum or math.isnan(spectrum[0]):
        return math.nan
    low = spectrum[max(1, math.ceil(p * len(spectrum))) - 1]
    return spectrum[0] / low if low > _floor(spectrum) else math.inf


def _floor(spectrum: list[float]) -> float:
    """Return the value up to which eigenvalues are rounding: of float32 data (squared), and of the decomposition."""
    return max(1.5e-14, len(spectrum) * 2.3e-16) * spectrum[0]


@dataclass(frozen=True)
class LayerConditioning(Result):
    """Spectra of one layer. Each has one list per point: all eigenvalues, largest first; [] if not recorded.

    ``input``: Sigma_x = E[x x^T], not centred. ``normalised``: of x after a batch RMS normalisation.
    ``preconditioned``: Sigma_x in the coordinates of the correction. ``both``: normalised, then preconditioned.
    ``gradient``: Sigma_g = E[g g^T] with g the output gradient of one sample.
    """

    name: str
    kind: str
    rows: list[int]  #: input rows that each point used
    input: list[list[float]]
    normalised: list[list[float]]
    preconditioned: list[list[float]]
    both: list[list[float]]
    gradient: list[list[float]]
    inputs: int = 0  #: units of the input; with ``max_units`` spectra may be those of fewer
    outputs: int = 0

    def spectrum(self, which: str = "input", point: int = -1) -> list[float]:
        if which not in SPECTRA:
            raise ValueError(f"conditioning: spectrum must be one of {', '.join(SPECTRA)}, got {shown(which)}")
        spectra: list[list[float]] = getattr(self, which)
        return spectra[point]

    def lambda_max(self, which: str = "input", point: int = -1) -> float:
        spectrum = self.spectrum(which, point)
        return spectrum[0] if spectrum else math.nan

    def kappa(self, which: str = "input", p: float = 1.0, point: int = -1) -> float:
        """Return kappa_p, the largest eigenvalue over that at share ``p`` of the spectrum (1: the condition number)."""
        return condition_number(self.spectrum(which, point), p)

    def rank(self, which: str = "input", point: int = -1) -> int:
        """Return the number of eigenvalues above the rounding of float32 data."""
        spectrum = self.spectrum(which, point)
        return sum(value > _floor(spectrum) for value in spectrum)

    def fisher_lambda_max(self, which: str = "input", point: int = -1) -> float:
        """Return lambda_max of the Fisher block Sigma_x x Sigma_g; stable rates are below 2 / lambda_max."""
        return self.lambda_max(which, point) * self.lambda_max("gradient", point)

    def fisher_kappa(self, which: str = "input", p: float = 1.0, point: int = -1) -> float:
        """Return kappa_p of the Fisher block, over all d_in * d_out products of the two spectra."""
        a = torch.tensor(self.spectrum(which, point), dtype=torch.float64)
        b = torch.tensor(self.spectrum("gradient", point), dtype=torch.float64)
        products = torch.outer(a, b).flatten()
        if not len(products) or products.isnan().any():
            return math.nan
        k = max(1, math.ceil(p * len(products)))
        low = float(products.kthvalue(len(products) - k + 1).values)
        top = float(products.max())
        return top / low if low > 1.5e-14 * top else math.inf


@dataclass(frozen=True)
class Conditioning(Result):
    """The spectra of all layers, in the order of their first call, and the options of the correction that was tried."""

    steps: list[int]
    layers: list[LayerConditioning]
    damping: float
    scaling: str
    chunk: int

    def plot(self, p: float = 0.8, point: int = -1) -> Figure:
        """Plot kappa_p of the inputs with each remedy, the largest eigenvalues, and the spectra of the worst layer."""
        made, axes = figure(3, width=4.6)
        names = [layer.name for layer in self.layers]
        looks = zip(COLOURS, ("input", "normalised", "preconditioned", "both"), strict=False)
        for colour, which in looks:
            values = [layer.kappa(which, p, point) for layer in self.layers]
            series(axes[0], names, [v if math.isfinite(v) else math.nan for v in values], colour, which)
        axes[0].set_title(f"$\\kappa_{{{100 * p:g}\\%}}$ of the layer inputs", fontsize=10)
        for colour, which in zip(COLOURS, ("input", "gradient"), strict=False):
            series(axes[1], names, [x.lambda_max(which, point) for x in self.layers], colour, which)
        axes[1].set_title(r"$\lambda_{\max}$", fontsize=10)
        many = [x for x in self.layers if x.rows[point] >= 2 * len(x.spectrum("input", point)) > 6]
        worst = max(
            many or self.layers, key=lambda x: min(-1 if math.isnan(k := x.kappa("input", p, point)) else k, 1e300)
        )
        for colour, which in zip(COLOURS, ("input", "normalised", "preconditioned", "both"), strict=False):
            spectrum = worst.spectrum(which, point)
            axes[2].plot([v if v > _floor(spectrum) else math.nan for v in spectrum], color=colour, label=which)
        axes[2].set_title(f"eigenvalues of the inputs of {shortened([worst.name])[0]}", fontsize=10)
        for axis in axes:
            log_scale(axis)
            axis.legend(fontsize=8, frameon=False)
        over_layers(axes[0], names)
        over_layers(axes[1], names)
        return made


class ConditioningRecorder(Recorder):
    """The recorder that :func:`conditioning` returns."""

    what = "conditioning"

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        every: int,
        average: int,
        max_rows: int | None,
        damping: float,
        scaling: str,
        chunk: int,
        reduction: str,
        max_units: int | None,
    ) -> None:
        ones = {"max_rows": 1 if max_rows is None else max_rows, "max_units": 1 if max_units is None else max_units}
        check_integers("conditioning", **ones, chunk=chunk)
        if ones["max_units"] < 1:
            raise ValueError(f"conditioning: max_units must be at least 1, or None for all, got {max_units}")
        check_numbers("conditioning", damping=damping)
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"conditioning: max_rows must be at least 1, or None for all, got {max_rows}")
        if not 0 <= damping < math.inf:
            raise ValueError(f"conditioning: damping must be finite and at least 0, got {damping}")
        if scaling not in ("absolute", "trace"):
            raise ValueError(f"conditioning: scaling must be 'absolute' or 'trace', got {shown(scaling)}")
        if chunk < 1:
            raise ValueError(f"conditioning: chunk must be at least 1, got {chunk}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"conditioning: reduction must be 'mean' or 'sum', got {shown(reduction)}")
        super().__init__(model, layers, every, average, weighted)
        self.max_rows: int | None = max_rows
        self.damping: float = damping
        self.scaling: str = scaling
        self.chunk: int = chunk
        self.reduction: str = reduction
        self._open: dict[int, dict[tuple[int, str], SecondMoment]] = {}  # by the step of the point
        self._closed: dict[int, dict[tuple[int, str], list[float]]] = {}
        self._groups: dict[int, int] = {}
        self.max_units: int | None = max_units
        self.left_out: list[str] = []  #: layers for which there was no time
        self._unit_dims: dict[int, int] = {}
        self._chosen: dict[tuple[int, str], tuple[Tensor | None, int, int]] = {}

    def clear(self) -> None:
        super().clear()
        self._open.clear()
        self._closed.clear()

    def _begin(self, *args: object) -> None:
        super()._begin(*args)
        if self._recording:
            for point in self.points[:-1] if self._open else ():
                self._close(point)

    def _add(self, point: Point, index: int, name: str, rows: Tensor) -> None:
        moments = self._open.setdefault(point.step, {})
        moments.setdefault((index, name), SecondMoment()).add(rows)

    def _forward(self, point: Point, index: int, module: nn.Module, x: Tensor | None, output: Tensor) -> None:
        kind = layer_type(module)
        self._unit_dims[index] = -1 if kind is None else kind.unit_dim
        self._groups[index] = 1 if kind is None else kind.num_groups(module)
        if x is not None and x.dim() and x.numel():
            rows, _ = unit_rows(x, self._unit_dims[index], self.max_rows, self._units(index, "input", x))
            self._add(point, index, "input", rows)

    def _units(self, index: int, name: str, x: Tensor) -> Tensor | None:
        """The units whose spectrum is taken, whole groups of a convolution, drawn once; None: all of them."""
        width = x.shape[self._unit_dims[index]]
        if (index, name) not in self._chosen:
            units, groups = None, self._groups[index]
            rows = x.numel() // width if self.max_rows is None else min(x.numel() // width, self.max_rows)
            most = width if self.max_units is None else min(self.max_units, max(SMALLEST, rows // 2))
            if width > most and width % groups == 0:
                size = width // groups  # of a group
                groups = min(groups, max(1, most // size))
                generator = torch.Generator().manual_seed(index)
                first = torch.randperm(self._groups[index], generator=generator)[:groups].sort().values
                within = torch.randperm(size, generator=generator)[:most].sort().values
                units = (first[:, None] * size + within).flatten()
            self._chosen[index, name] = units, groups, width
        return self._chosen[index, name][0]

    def _backward(self, point: Point, index: int, gradient: Tensor) -> None:
        if gradient.numel():
            units = self._units(index, "gradient", gradient)
            rows, count = unit_rows(gradient, self._unit_dims[index], self.max_rows, units)
            self._add(point, index, "gradient", rows * count if self.reduction == "mean" else rows)

    def _close(self, point: Point) -> None:
        moments = self._open.pop(point.step, {})
        layers = list(dict.fromkeys(index for index, _ in moments))
        for index in (layers[i] for i in spread(len(layers))):
            if out_of_time():
                self.left_out.append(self.names[index])
                continue
            with self._kept_going(index):
                for name in ("input", "gradient"):
                    if (index, name) in moments:
                        self._spectra(point, index, name, moments[index, name])

    def _spectra(self, point: Point, index: int, name: str, moment: SecondMoment) -> None:
        done = self._closed.setdefault(point.step, {})
        moment = moment.grouped(self._chosen[index, name][1])
        done[index, name] = moment.spectrum().tolist()
        if name == "input":
            groups = self._chosen[index, name][1]
            chunks = chunks_of(moment.units, groups, self.chunk)
            square = moment.mean_square()
            normalised = moment.scaled((square + RMS_EPS * (square.max() + 1e-6)).rsqrt())
            done[index, "normalised"] = normalised.spectrum().tolist()
            for key, before in (("preconditioned", moment), ("both", normalised)):
                after = before.preconditioned(self.damping, self.scaling, chunks, groups)
                done[index, key] = after.spectrum().tolist()
            point.counts[index]["rows"] = moment.count

    def result(self) -> Conditioning:
        seen = self._seen()
        for point in self.points:
            self._close(point)
        layers = []
        for i in seen:
            spectra = {
                which: [self._closed.get(point.step, {}).get((i, which), []) for point in self.points]
                for which in SPECTRA
            }
            rows = [point.counts[i].get("rows", 0) for point in self.points]
            widths = [self._chosen.get((i, name), (None, 1, 0))[2] for name in ("input", "gradient")]
            layers.append(
                LayerConditioning(self.names[i], self.kinds[i], rows, **spectra, inputs=widths[0], outputs=widths[1])
            )
        return Conditioning([p.step for p in self.points], layers, self.damping, self.scaling, self.chunk)


def conditioning(
    model: nn.Module,
    *,
    layers: Layers = None,
    every: int = 1,
    average: int = 1,
    max_rows: int | None = 10_000,
    damping: float = 0.1,
    scaling: str = "trace",
    chunk: int = 128,
    reduction: str = "mean",
    max_units: int | None = None,
) -> ConditioningRecorder:
    """Attach a recorder of the eigenvalues of Sigma_x and Sigma_g of every weight layer (Huang et al., ECCV 2020).

    Their largest products bound the learning rate, their condition numbers the speed of convergence of that layer. The
    spectra of the inputs are also given after batch RMS normalisation, after the correction of
    ``consistency_ops.Preconditioner`` with ``damping``, ``scaling`` and ``chunk``, and after both: what each remedy
    would do here. Convolutions: all pixels of all images are rows, the units are channels.

    A recorded pass costs a float64 Gram matrix per layer, and its eigenvalues when the next recorded pass begins or
    ``result()`` is called (this waits for the device); other passes cost one Python call per layer. Choose ``every``.

    Args:
        model, layers, every, average: see :class:`~consistency_ops.analysis.Recorder`; by default all layers with
            weights.
        max_rows: largest number of rows (samples, tokens, pixels) per layer and pass; None: all. Of more, one
            of every block of them, drawn at random.
        damping, scaling, chunk: options of the correction that is tried, without its bias unit.
        reduction: how the loss is reduced over rows: with ``"mean"`` output gradients are multiplied by the number of
            rows, which restores the gradient of one sample (in convolutions, as in the paper's code, times the pixels).
        max_units: spectra of wider inputs and outputs are those of so many units (and of no more than half as many as
            there are rows), drawn at random: their largest eigenvalues are smaller then; None: of all.

    Example::

        with co.analysis.conditioning(model) as monitor:
            loss_fn(model(x), y).backward()
        for layer in monitor.result().layers:
            print(layer.name, layer.kappa("input", 0.8), layer.kappa("preconditioned", 0.8))
    """
    return ConditioningRecorder(model, layers, every, average, max_rows, damping, scaling, chunk, reduction, max_units)
