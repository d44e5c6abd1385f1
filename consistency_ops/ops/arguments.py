"""Arguments that all stages of the correction share: options that check themselves, and what a schema cannot carry.

A schema has no lists with missing entries, no unsigned integers and no defaults that depend on a dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import check_integers, check_list, check_options

Scaling = Literal["absolute", "trace"]
_SECTOR = 32  # bytes: the unit in which GPUs move memory; the default group is one sector of the gradient


@dataclass(slots=True)  # not frozen, which would cost a microsecond a call
class Options:
    """The options that all layers of one call share; making one raises if an option is out of range or no number.

    ``op`` is the name of the public function that was called, with which every error message begins. A function that
    does not take one of the options leaves it at its default. The options are described at :func:`precondition`.
    """

    op: str
    damping: float = 1.0
    scaling: str = "absolute"
    chunk: int | None = 128
    group: int | None = None
    max_rows: int = 10_000
    seed: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        check_options(
            self.op, self.damping, self.scaling, self.chunk, self.group, self.max_rows, seed=self.seed, step=self.step
        )


def default_group(dtype: torch.dtype, chunk: int) -> int:
    """The number of consecutive units that stay together if the caller does not say: those that fill 32 bytes.

    GPUs read and write memory in sectors of 32 bytes, so a smaller group would move bytes that it does not use. 8 units
    of a float32 gradient, 16 of bfloat16, 4 of float64; never more than ``chunk`` (0: whole layers).
    """
    units = _SECTOR // dtype.itemsize
    return min(units, chunk) if chunk else units


def signed(seed: int) -> int:
    """The signed 64-bit integer with the same 64 bits as ``seed``: schemas know no unsigned integers."""
    return (int(seed) + 2**63) % 2**64 - 2**63


def dense(entries: Sequence[Tensor | None] | None) -> tuple[list[Tensor], list[int]]:
    """The tensors among ``entries`` without the ``None``, and for each the index of the layer to which it belongs.

    Schemas of operators have no lists with holes. ``None`` instead of a list means that no layer has an entry.
    """
    if entries is None:
        return [], []
    present = [(entry, i) for i, entry in enumerate(entries) if entry is not None]
    return [entry for entry, _ in present], [i for _, i in present]


def check_entries(op: str, count: int, layers: Sequence[int] | None, **lists: Sequence[Any] | None) -> None:
    """Raise unless every list that is given has one entry for each of the ``count`` layers, and ``layers`` integers."""
    for name, entries in {**lists, "layers": layers}.items():
        if entries is not None:
            check_list(op, name, entries, count)
    for layer in layers or ():
        check_integers(op, layers=layer)


def layer_numbers(layers: Sequence[int] | None, count: int) -> list[int]:
    """The number of each layer in the random division; without ``layers`` its position in the list."""
    return list(range(count)) if layers is None else list(layers)


def count_chunks(units: int, chunk: int) -> int:
    """The number of chunks into which a layer of ``units`` units is divided; ``chunk`` 0: one."""
    return -(-units // chunk) if chunk else 1
