"""Runs all monitors on one batch of one model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import type_name
from .activation_statistics import activation_statistics
from .conditioning import conditioning
from .findings import Finding, Measurements, find
from .gradient_energy import gradient_energy
from .html_page import page
from .lipschitz import lipschitz_bound
from .propagation import propagation
from .recorder import Layers, first_tensor
from .weight_domination import weight_domination


@dataclass(frozen=True)
class Analysis(Measurements):
    """Measurements and their ``findings``, the most serious ones first."""

    findings: list[Finding]

    def to_html(self, title: str = "", about: dict[str, str] | None = None) -> str:
        """Return one self-contained HTML page: text, tables and inline SVG, no script, nothing from a network."""
        return page(self, self.findings, title or self.model, about or {})


def analyse(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor],
    layers: Layers = None,
    samples: int = 4,
    damping: float = 0.1,
    chunk: int = 128,
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

    Raises:
        TypeError, ValueError: a loss that is no scalar tensor, no samples, or what the monitors refuse.

    Example::

        result = co.analysis.analyse(model, x, loss=lambda z: F.cross_entropy(z, y))
        for finding in result.findings:
            print(finding)
        Path("report.html").write_text(result.to_html())
    """
    batch = next((len(x) for x in inputs if isinstance(x, Tensor) and x.dim()), 1)
    if not batch:
        raise ValueError("analyse: inputs must have at least one sample, got none")
    with (
        activation_statistics(model, layers=layers) as first,
        gradient_energy(model, layers=layers) as second,
        conditioning(model, layers=layers, damping=damping, chunk=chunk) as third,
        weight_domination(model, layers=layers) as fourth,
    ):
        output = model(*inputs)
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type_name(value)
            raise TypeError(f"analyse: loss must return a tensor with one element, got {got}")
        value.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
    tensor = first_tensor(output)
    spread = propagation(model, *inputs, loss=loss, layers=layers, samples=samples, exact=256, steps=16)
    bound, reason = None, ""
    try:
        with torch.random.fork_rng(devices=[]):
            bound = lipschitz_bound(model, *inputs)
    except NotImplementedError as error:
        reason = str(error).removeprefix("lipschitz_bound: ")
    number = float(value.detach())
    measured = Measurements(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        mode="training" if model.training else "evaluation",
        samples=batch,
        loss=number if math.isfinite(number) else math.nan,
        statistics=first.result(),
        energy=second.result(),
        conditioning=third.result(),
        domination=fourth.result(),
        propagation=spread,
        lipschitz=bound,
        no_lipschitz=reason,
    )
    found = find(measured, finite=tensor is not None and bool(tensor.isfinite().all()))
    return Analysis(**vars(measured), findings=found)
