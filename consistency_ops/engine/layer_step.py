"""One layer in one step: its gradient as a matrix, and the input rows that correct it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

from .dtensors import as_plain
from .layer import Layer
from .notices import Notices, some


class LayerStep:
    """What a correction needs of a layer in this step."""

    # Written by hand: one is made a layer and a step, and a generated constructor takes twice the time.
    __slots__ = (
        "bias_grad",
        "convolution_groups",
        "count",
        "division_id",
        "grad",
        "layer",
        "rows",
        "units",
        "weight",
    )

    def __init__(
        self, layer: Layer, weight: Parameter, grad: Tensor, bias_grad: Tensor | None, rows: Tensor, count: Tensor
    ) -> None:
        width = grad.shape[1]
        self.layer: Layer = layer
        self.weight: Parameter = weight
        self.grad: Tensor = grad  # (out, in) or (out, in / groups, *kernel), a view of weight.grad
        self.bias_grad: Tensor | None = bias_grad  # (out,)
        self.rows: Tensor = rows  # (at most max_rows, in); only the first `count` rows hold data
        self.count: Tensor = count  # int64, (1,), on the device
        # Third argument of the random division, next to seed and step.
        self.division_id: int = layer.index
        self.units: int = width if bias_grad is None else width + 1  # of one convolution group, the bias included
        self.convolution_groups: int = rows.shape[1] // width

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of covariances and inverses."""
        return torch.float64 if self.rows.dtype == torch.float64 else torch.float32

    @property
    def units_unchanged(self) -> bool:
        """False if the stored covariance and inverse have another number of units: the bias was frozen in between."""
        return self.layer.inverse_units in (None, self.units)

    @property
    def gradients(self) -> list[Tensor]:
        return [self.grad] if self.bias_grad is None else [self.grad, self.bias_grad]

    def write_back(self) -> None:
        """Copy ``grad`` to ``weight.grad`` where it is a copy and not a view."""
        kind = self.layer.kind
        if kind.groups is None:  # the only layers that have copies
            return
        module = self.layer.module()
        if module is not None and kind.copies(module):
            assert self.weight.grad is not None
            kind.write_back(module, self.grad, self.weight.grad)


def layer_step(layer: Layer, owned: Container[int], notices: Notices) -> LayerStep | None:
    """What this step has of a layer that one process holds alone.

    Args:
        layer: one that captures.
        owned: ids of the parameters that the optimizer updates.
        notices: told when rows of the layer were lost.

    Returns:
        None if there is nothing to correct: no module, no gradient, a gradient that cannot be corrected in place, a
        weight that is tied, frozen or not the optimizer's, or lost rows.
    """
    module, capture, kind = layer.module(), layer.capture, layer.kind
    if module is None or capture is None:
        return None
    parameters = module._parameters
    weight = parameters.get(kind.weight)
    if weight is None or layer.tied or id(weight) not in owned or (type(weight) is not Parameter and is_lazy(weight)):
        return None
    capture.follow(module, weight)
    grad = gradient = weight.grad
    if grad is not None and type(grad) is not Tensor:
        grad = as_plain(grad)
    layer.unfit_gradient = gradient is not None and (grad is None or not is_plain(grad))
    if (lost := capture.lost) != layer.lost_rows:
        layer.lost_rows = lost
        if lost:
            _notice_lost_rows(layer, notices)
    if grad is None or layer.unfit_gradient or layer.lost_rows or not weight.requires_grad:
        return None
    source = capture.source or capture
    source.settle(gradient, capture)
    bias = parameters.get(kind.bias) if layer.joins_bias and kind.bias else None
    bias_grad = bias.grad if bias is not None and id(bias) in owned else None
    if bias_grad is not None:
        bias_grad = kind.bias_view(bias_grad) if is_plain(bias_grad) else None
    assert source.count is not None
    rows = source.buffer if source.rows is None else source.rows
    return LayerStep(layer, weight, kind.view(module, grad), bias_grad, rows, source.count)


def _notice_lost_rows(layer: Layer, notices: Notices) -> None:
    notices.once(
        f"lost {layer.name}",
        f"layer {layer.name!r} was called less often than the layer whose input it shared, so its gradient was left as "
        "it is in this step. From now on it captures rows of its own; nothing needs to be done.",
    )


def notice_unseen(steps: list[LayerStep], notices: Notices) -> bool:
    """Say which layers have a gradient although their hook never fired; returns False if it is too early to tell."""
    steps = [step for step in steps if not step.grad.is_meta and bool(step.grad.count_nonzero())]  # not idle experts
    if not steps:
        return False
    unseen = []
    for step in steps:
        module = step.layer.module()
        if module is not None and module.training and int(step.count) == 0:
            unseen.append(step.layer.name)
    if unseen:
        notices.once(
            "unseen",
            f"{len(unseen)} of {len(steps)} layers with a gradient have seen no input, so it was left as it is: "
            f"{some(unseen)}. If the model is compiled, construct the Preconditioner before its first call, or call "
            "torch.compiler.reset(). For a weight that is used without calling its module call "
            "consistency_ops.capture(its input, weight) there.",
        )
    return True


def by_launch(steps: Iterable[LayerStep], chunk_of: Callable[[int, int], int]) -> list[list[LayerStep]]:
    """The layers that one launch can correct: those on one device, of one precision, with chunks of one size.

    ``chunk_of``: the largest chunk for a layer of so many units in so many convolution groups.
    """
    found: dict[tuple[torch.device, torch.dtype, int], list[LayerStep]] = {}
    # The layer before is often of the same kind: quicker.
    last: tuple[torch.device, torch.dtype, int, int] | None = None
    batch: list[LayerStep] = []
    for step in steps:
        rows = step.rows
        kind = rows.device, rows.dtype, step.units, step.convolution_groups
        if kind != last:
            last = kind
            batch = found.setdefault((rows.device, step.compute_dtype, chunk_of(*kind[2:])), [])
        batch.append(step)
    return list(found.values())


def in_order_of_input(steps: list[LayerStep]) -> list[LayerStep]:
    """Put layers with the same rows next to each other, with one division: the operator factors them once."""
    runs: dict[tuple[int, bool, torch.dtype], list[LayerStep]] = {}
    for step in steps:
        key = id(step.rows) if step.convolution_groups == 1 else id(step), step.bias_grad is None, step.grad.dtype
        run = runs.setdefault(key, [])
        run.append(step)
        step.division_id = run[0].layer.index
    return [step for run in runs.values() for step in run]


def is_plain(grad: Tensor) -> bool:
    """Whether a gradient can be corrected in place: it is dense, not wrapped, and repeats no element (``expand``)."""
    if type(grad) is not Tensor or grad.layout is not torch.strided:
        return False
    return grad.is_contiguous() or torch._debug_has_internal_overlap(grad) != 1
