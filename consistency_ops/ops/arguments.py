"""Arguments of the operators: what their schemas cannot carry, and the defaults that depend on a dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .checks import check_integers, check_list

Scaling = Literal["absolute", "trace"]
_SECTOR = 32  # bytes: the unit in which GPUs move memory; the default group is one sector of the gradient


def default_group(dtype: torch.dtype, chunk: int) -> int:
    """Units of a gradient that fill one sector."""
    return min(_SECTOR // dtype.itemsize, chunk)


def signed(seed: int) -> int:
    return (int(seed) + 2**63) % 2**64 - 2**63


def dense(entries: Sequence[Tensor | None] | None) -> tuple[list[Tensor], list[int]]:
    """The entries that are there, and the layers they belong to: the form that operator schemas can carry."""
    if entries is None:
        return [], []
    present = [(entry, i) for i, entry in enumerate(entries) if entry is not None]
    return [entry for entry, _ in present], [i for _, i in present]


def check_entries(op: str, count: int, layers: Sequence[int] | None, **lists: Sequence | None) -> None:
    """Every list that is given has one entry a layer."""
    for name, entries in {**lists, "layers": layers}.items():
        if entries is not None:
            check_list(op, name, entries, count)
    for layer in layers or ():
        check_integers(op, layers=layer)


def count_chunks(units: int, chunk: int) -> int:
    return -(-units // chunk)
