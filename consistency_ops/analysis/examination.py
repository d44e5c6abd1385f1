"""Runs all monitors on one batch of one model, each for a share of the time, and none at the cost of another."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops.checks import type_name
from .activation_statistics import activation_statistics
from .conditioning import Conditioning, conditioning
from .findings import CLOSED, Finding, Measurements, find
from .gradient_energy import gradient_energy
from .html_page import page
from .lipschitz import LipschitzBound, lipschitz_bound
from .propagation import Propagation, batch_of, propagation
from .recorder import Layers, Recorder, choose, first_line, first_tensor, weighted
from .time_limit import TimeLimit, limited
from .weight_domination import weight_domination

T = TypeVar("T")
Progress = Callable[[str], None]

# Shares of the time that is left when a part begins; what it does not use is there for the next ones.
_SHARES = {"conditioning": 0.4, "propagation": 0.6, "lipschitz": 0.9}
_EIGENVALUES = 4e9  # sum of width^3 over the layers, up to which spectra of whole widths are taken in a limited time
_WIDTHS = (1024, 512, 256, 128)


@dataclass(frozen=True, repr=False)
class Analysis(Measurements):
    """Measurements and their ``findings``, the most serious ones first. ``print`` shows the findings, a line each."""

    findings: list[Finding]

    def __repr__(self) -> str:
        count = f"{len(self.findings)} finding{'s' * (len(self.findings) != 1)}"
        return f"Analysis({self.model}, {self.parameters:,} parameters, loss {self.loss:.4g}, {count})"

    def __str__(self) -> str:
        missing = [f"{name} could not be measured: {why}" for name, why in self.failed.items()]
        return "\n".join([repr(self), *map(str, self.findings), *missing])

    def to_html(self, title: str = "", about: dict[str, str] | None = None) -> str:
        """Return one self-contained HTML page: text, tables and inline SVG, no script, nothing from a network."""
        return page(self, self.findings, title or self.model, about or {})


class _Parts:
    """Runs the parts of an examination; what went wrong in one is a sentence on the page, and no exception."""

    def __init__(self, seconds: float, progress: Progress) -> None:
        self.seconds: float = seconds
        self.limit: TimeLimit = TimeLimit(seconds)
        self.progress: Progress = progress
        self.tolerant: bool = math.isfinite(seconds)
        self.failed: dict[str, str] = {}

    def passed(self) -> None:
        """The passes are done. However long they took, the rest gets its time."""
        self.limit = TimeLimit(max(0.5 * self.seconds, self.limit.left()))

    def run(self, name: str, sentence: str, work: Callable[[], T], otherwise: T) -> T:
        """What ``work()`` returns, or ``otherwise``. Without a time limit an exception is the caller's."""
        self.progress(sentence)
        if not self.tolerant:
            return work()
        try:
            with limited(TimeLimit(_SHARES[name] * self.limit.left())):
                return work()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.failed[name] = first_line(error)
            return otherwise


def analyse(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor],
    layers: Layers = None,
    samples: int = 4,
    damping: float = 0.1,
    chunk: int = 128,
    keywords: Mapping[str, Any] | None = None,
    synthetic: bool = False,
    seconds: float = math.inf,
    progress: Progress | None = None,
) -> Analysis:
    """Run every monitor on one batch and say what is wrong in this network, layer by layer, and what would help.

    One forward and backward pass with :func:`activation_statistics`, :func:`gradient_energy`, :func:`conditioning` and
    :func:`weight_domination` attached, :func:`propagation`, and :func:`lipschitz_bound` where it exists.
    ``.grad`` of the parameters and running statistics are as after one training step without an update; weights are
    untouched. Advice follows from the measured numbers by the thresholds in
    ``consistency_ops.analysis.findings``, which the page repeats.

    Args:
        model, inputs: called as ``model(*inputs)``, in its present mode; dimension 0 is the batch.
        loss: computes the loss of the model's output, a mean over the samples.
        layers: patterns or types of the layers to examine; None: all layers with weights (and for the activation
            statistics all modules without children).
        samples: number of samples for the Jacobians of :func:`propagation`.
        damping, chunk: options of the correction that :func:`conditioning` tries.
        keywords: inputs by name; then the call is ``model(*inputs, **keywords)``.
        synthetic: whether the inputs are random numbers: then nothing is concluded from how alike they are.
        seconds: about how long to measure. Layers and blocks for which no time is left are named, wide layers are
            represented by some of their units, and a part that fails is a sentence in ``failed``. The forward and
            backward pass are made whatever they take, and half of the time is there for the rest. Infinite: everything
            is measured, and what goes wrong is an exception.
        progress: is called with a sentence before each part.

    Raises:
        TypeError, ValueError: a loss that is no scalar tensor, no samples, or what the monitors refuse.

    Example::

        result = co.analysis.analyse(model, x, loss=lambda z: F.cross_entropy(z, y))
        for finding in result.findings:
            print(finding)
        Path("report.html").write_text(result.to_html())
    """
    given = {} if keywords is None else dict(keywords)
    batch = batch_of(inputs, given)
    if not batch:
        raise ValueError("analyse: inputs must have at least one sample, got none")
    parts = _Parts(seconds, progress or (lambda sentence: None))
    width = _max_units(model, layers) if parts.tolerant else None
    monitors: tuple[Recorder, ...]
    with (
        activation_statistics(model, layers=layers) as first,
        gradient_energy(model, layers=layers) as second,
        conditioning(model, layers=layers, damping=damping, chunk=chunk, max_units=width) as third,
        weight_domination(model, layers=layers) as fourth,
    ):
        monitors = first, second, third, fourth
        fourth.rough = parts.tolerant
        for monitor in monitors:
            monitor.tolerant = parts.tolerant
        parts.progress("forward pass")
        output = model(*inputs, **given)
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type_name(value)
            raise TypeError(f"analyse: loss must return a tensor with one element, got {got}")
        parts.progress("backward pass")
        value.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
    tensor = first_tensor(output)
    finite = tensor is not None and bool(tensor.isfinite().all())
    number = float(value.detach())
    del output, value, tensor
    parts.passed()
    spectra = parts.run(
        "conditioning", "conditioning: eigenvalues", third.result, Conditioning([], [], damping, third.scaling, chunk)
    )
    spread = parts.run(
        "propagation",
        "propagation: Jacobians from layer to layer",
        lambda: propagation(
            model, *inputs, loss=loss, layers=layers, samples=min(samples, batch), exact=256,
            steps=8 if parts.tolerant else 16, keywords=given,
        ),
        Propagation([], 0, "loss"),
    )  # fmt: skip
    nothing: tuple[LipschitzBound | None, str] = (None, "it could not be computed")
    bound, reason = parts.run("lipschitz", "Lipschitz bound", lambda: _bound(model, inputs, given), nothing)
    for monitor in monitors:
        if monitor.failures:
            name, said = next(iter(monitor.failures.items()))
            many = f" and {len(monitor.failures) - 1} more" if len(monitor.failures) > 1 else ""
            parts.failed.setdefault(monitor.what, f"{name}{many} could not be measured ({said})")
    for what, left in (("conditioning", third.left_out), ("propagation", spread.left_out)):
        if left:
            parts.failed.setdefault(what, f"{len(left)} left out, among them {left[0]}")
    measured = Measurements(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        mode="training" if model.training else "evaluation",
        samples=batch,
        loss=number if math.isfinite(number) else math.nan,
        statistics=first.result(),
        energy=second.result(),
        conditioning=spectra,
        domination=fourth.result(),
        propagation=spread,
        lipschitz=bound,
        no_lipschitz=reason,
        zero_scales=_zero_scales(model),
        synthetic=synthetic,
        failed=parts.failed,
    )
    return Analysis(**vars(measured), findings=find(measured, finite))


def _max_units(model: nn.Module, layers: Layers) -> int:
    """The width up to which all spectra together take some seconds; it depends on the network, not on the machine."""
    shapes = [
        weight.shape
        for module in choose("analyse", model, layers, weighted).values()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() > 1
    ]
    widths = [side for shape in shapes for side in shape[:2]]
    fits = (width for width in _WIDTHS if sum(min(side, width) ** 3 for side in widths) <= _EIGENVALUES)
    return next(fits, _WIDTHS[-1])


def _zero_scales(model: nn.Module) -> list[str]:
    """Modules whose weight is 0, or scales that are nearly so, and that get a gradient: their branches open in time."""
    found = []
    for name, parameter in model.named_parameters():
        owner, _, key = name.rpartition(".")
        if key.endswith("bias") or not parameter.numel():
            continue
        largest = CLOSED if parameter.dim() < 2 else 0.0  # a vector that multiplies channels, such as a layer scale
        zero = float(parameter.detach().abs().max()) <= largest
        if zero and parameter.grad is not None and bool(parameter.grad.any()):
            found.append(owner if key == "weight" else name)
    return found


def _bound(model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[LipschitzBound | None, str]:
    """The bound, or the reason why there is none."""
    try:
        example = inputs
        if keywords:  # the bound takes its example in order
            bound = inspect.signature(model.forward).bind(*inputs, **keywords)
            bound.apply_defaults()
            if bound.kwargs:
                return None, f"it takes {', '.join(map(str, bound.kwargs))} by name only"
            example = bound.args
        with torch.random.fork_rng(devices=[]):
            return lipschitz_bound(model, *example), ""
    except NotImplementedError as error:
        return None, str(error).removeprefix("lipschitz_bound: ")
