"""A layer in one step: its gradient as a matrix, and the rows that it is corrected with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .coverage import Layer


@dataclass(eq=False)
class Item:
    """A layer that is corrected in this step."""

    layer: Layer
    weight: Parameter
    grad: Tensor  # (out, in) or (out, in / groups, *kernel), a view of weight.grad
    bias_grad: Tensor | None  # (out,)
    rows: Tensor  # (max_rows, in); the first `count` count
    count: Tensor
    parts: list[Item] = field(default_factory=list)  # layers with the same rows, whose gradients `grad` joins

    @property
    def units(self) -> int:
        return self.grad.shape[1] + (self.bias_grad is not None)

    @property
    def divided_as_before(self) -> bool:
        """Whether the stored matrices have the units of this step: a bias may have come or gone."""
        return self.layer.inverted_units in (None, self.units)

    def write_back(self) -> None:
        """Where ``grad`` is a copy, not a view: return it to its place."""
        if self.parts:
            sizes = [len(part.grad) for part in self.parts]
            torch._foreach_copy_([part.grad for part in self.parts], self.grad.split(sizes))
            if self.bias_grad is not None:
                torch._foreach_copy_([part.bias_grad for part in self.parts], self.bias_grad.split(sizes))
        elif self.layer.kind.copies(module := self.layer.module()):
            self.layer.kind.write_back(module, self.grad, self.weight.grad)


def join(batch: list[Item]) -> list[Item]:
    """Layers with the same rows become one, with their gradients one above the other: one covariance, one inverse."""
    joined: dict[tuple, list[Item]] = {}
    for item in batch:
        grad, bias = item.grad, item.bias_grad
        whole = grad.shape[1] == item.rows.shape[1]  # else the outputs are divided into convolution groups
        key = id(item.rows) if whole else id(item), grad.shape[1:], grad.dtype, None if bias is None else bias.dtype
        joined.setdefault(key, []).append(item)
    result = []
    for first, *others in joined.values():
        if not others:
            result.append(first)
            continue
        parts = [first, *others]
        bias = None if first.bias_grad is None else torch.cat([item.bias_grad for item in parts])
        grad = torch.cat([item.grad for item in parts])
        result.append(Item(first.layer, first.weight, grad, bias, first.rows, first.count, parts))
    return result


def is_plain(grad: Tensor) -> bool:
    return type(grad) is Tensor and grad.layout is torch.strided
