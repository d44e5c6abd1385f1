"""A layer in one step: its gradient as a matrix, and the rows that it is corrected with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .layer import Layer


@dataclass(eq=False)
class Item:
    """A layer that is corrected in this step."""

    layer: Layer
    weight: Parameter
    grad: Tensor  # (out, in) or (out, in / groups, *kernel), a view of weight.grad
    bias_grad: Tensor | None  # (out,)
    rows: Tensor  # (max_rows, in); the first `count` count
    count: Tensor
    division: int = field(init=False)  # layer number of the random division

    def __post_init__(self) -> None:
        self.division = self.layer.index

    @property
    def units(self) -> int:
        return self.grad.shape[1] + (self.bias_grad is not None)

    @property
    def divided_as_before(self) -> bool:
        """Whether the stored matrices have the units of this step: a bias may have come or gone."""
        return self.layer.inverted_units in (None, self.units)

    def write_back(self) -> None:
        """Where ``grad`` is a copy, not a view: return it to its place."""
        if self.layer.kind.copies(module := self.layer.module()):
            self.layer.kind.write_back(module, self.grad, self.weight.grad)


def side_by_side(batch: list[Item]) -> list[Item]:
    """Layers with the same rows one after the other, with one division: the operator makes one inverse for all."""
    runs: dict[tuple, list[Item]] = {}
    for item in batch:
        whole = item.grad.shape[1] == item.rows.shape[1]  # else the outputs are divided into convolution groups
        key = id(item.rows) if whole else id(item), item.bias_grad is None, item.grad.dtype
        run = runs.setdefault(key, [])
        run.append(item)
        item.division = run[0].layer.index
    return [item for run in runs.values() for item in run]


def is_plain(grad: Tensor) -> bool:
    """Whether it can be corrected in place: not where it is sparse or wrapped, or repeats its elements (``expand``)."""
    if type(grad) is not Tensor or grad.layout is not torch.strided:
        return False
    return grad.is_contiguous() or torch._debug_has_internal_overlap(grad) != 1
