"""The other side of ``mode="whiten"``: gradients are whitened over a layer's outputs, too.

With ``G`` in the whitened coordinates of the inputs (``whitening.py``), its columns are taken as rows of data: their
damped running second moment ``B = K K^T``, by chunks of outputs, gives the optimizer ``K^-1 G``, and its displacement
``D`` is mapped back to ``K^-T D``. It is the same arithmetic on the transposed matrices, so the same operators do it.
Nothing is captured in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .. import ops
from ..ops.whitening import Layers, foreach_multiply_, foreach_unwhiten_, foreach_whiten_, foreach_whiten_by_
from .dtensors import is_dtensor
from .layer_step import LayerStep
from .state import StateStore

if TYPE_CHECKING:
    from .correction import CorrectionOptions

Matrix = tuple[Tensor, Tensor | None]  # (outputs, inputs) or (outputs, inputs, *kernel), and the bias, one more column


@dataclass(eq=False)
class OutputSide:
    """The layers of one launch that were whitened over their outputs, until the optimizer has made its step."""

    places: list[int]  # of its layers among those of the launch over the inputs
    launch: Layers
    factors: list[Tensor]  # K^-1 of every layer, (chunks, chunk, chunk)
    info: Tensor
    has_gradient: Tensor  # int32, one entry a layer

    @property
    def dtype(self) -> torch.dtype:
        return self.factors[0].dtype

    def map_back_(self, now: list[Matrix], before: list[Matrix], *, keep_norm: bool) -> None:
        """Replace every displacement ``D``, ``now - before``, by ``K^-T D``, with the norm of ``D`` if it is kept."""
        after, old = self._columns(now), self._columns(before)
        foreach_unwhiten_(
            after, [], old, [], self.factors, self.info, self.has_gradient, self.launch, keep_norm=keep_norm
        )
        self._write(after, now)

    def multiply_(self, matrices: list[Matrix], lower: list[Tensor]) -> None:
        """Replace every matrix ``W`` by ``K^T W``, given ``K``."""
        columns = self._columns(matrices)
        foreach_multiply_(columns, [], lower, self.info, self.launch)
        self._write(columns, matrices)

    def _columns(self, matrices: list[Matrix]) -> list[Tensor]:
        return [columns_of(matrices[place], self.dtype) for place in self.places]

    def _write(self, columns: Iterable[Tensor], matrices: list[Matrix]) -> None:
        for place, values in zip(self.places, columns, strict=True):
            write_columns(matrices[place], values)


def columns_of(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The columns of a matrix, of all taps of a kernel, the bias last, as rows (columns, outputs): a copy."""
    weight, bias = matrix
    rows = weight.flatten(1).T
    units = len(rows)
    columns = rows.new_empty(units + (bias is not None), rows.shape[1], dtype=dtype)
    columns[:units].copy_(rows)
    if bias is not None:
        columns[units].copy_(bias)
    return columns


def write_columns(matrix: Matrix, columns: Tensor) -> None:
    """The opposite of :func:`columns_of`, in place."""
    weight, bias = matrix
    if bias is not None:
        bias.copy_(columns[-1])
        columns = columns[:-1]
    weight.copy_(columns.T.reshape(weight.shape))


def whiten_outputs(
    steps: list[LayerStep],
    has_gradient: Tensor,
    store: StateStore,
    options: CorrectionOptions,
    chunk_of: Callable[[int], int],
    damping: float | None,
) -> list[OutputSide]:
    """Whiten gradients that are whitened over the inputs already; those of weights that are dealt to ranks stay.

    Args:
        has_gradient: int32, one entry a layer.
        chunk_of: the largest chunk for so many outputs.
        damping: for new factors; ``None``: those of the last refresh are used. A layer that has none waits.
    """
    flags = has_gradient.unbind()
    by_chunk: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        known = damping is not None or store.newest(step.layer, "output_inverse") is not None
        if known and not is_dtensor(step.weight) and step.grad.numel():
            by_chunk.setdefault(chunk_of(len(step.grad)), []).append(i)
    sides = []
    for chunk, places in by_chunk.items():
        some, dtype = [steps[i] for i in places], steps[places[0]].compute_dtype
        matrices: list[Matrix] = [(step.grad, step.bias_grad) for step in some]
        columns = [columns_of(matrix, dtype) for matrix in matrices]
        group = ops.default_group(dtype, chunk) if options.group is None else min(options.group, chunk)
        indices = [step.layer.index for step in some]
        launch = Layers([], indices, [group] * len(some), chunk, options.seed, 0)  # the division is fixed
        seen = torch.stack([flags[i] for i in places])
        if damping is None:
            factors, info = _stored_factors(some, columns, launch, store)
        else:
            factors, info = _new_factors(some, columns, launch, store, options, damping, seen)
        sides.append(OutputSide(places, launch, factors, info, seen))
        for matrix, values in zip(matrices, columns, strict=True):
            write_columns(matrix, values)
    return sides


def _new_factors(
    steps: list[LayerStep],
    columns: list[Tensor],
    launch: Layers,
    store: StateStore,
    options: CorrectionOptions,
    damping: float,
    seen: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Factors from these columns and the average of earlier ones; the columns become whitened, in place.

    A gradient that is zero does not enter the average.
    """
    counts = [(flag > 0).long().view(1) * len(x) for flag, x in zip(seen.unbind(), columns, strict=True)]
    shapes = [(-(-x.shape[1] // launch.chunk), launch.chunk, launch.chunk) for x in columns]
    totals: list[Tensor] = []
    weights: list[Tensor] = []
    for step, x, shape in zip(steps, columns, shapes, strict=True):
        if options.decay > 0:
            total, weight = store.running_sum(step.layer, shape, x.dtype, x.device, prefix="output_")
            step.layer.pending.update(output_covariance=total, output_weight=weight)
            totals.append(total)
            weights.append(weight)
    factors = [x.new_zeros(shape) for x, shape in zip(columns, shapes, strict=True)]
    info, _, _ = foreach_whiten_(
        columns,
        [],
        [x.clone() for x in columns],
        counts,
        totals,
        weights,
        factors,
        launch,
        damping=damping,
        scaling=options.scaling,
        decay=float(options.decay),
        max_rows=max(map(len, columns)),
    )
    if options.every > 1:
        begin = 0
        for step, factor in zip(steps, factors, strict=True):
            end = begin + len(factor)
            step.layer.pending.update(output_inverse=factor, output_info=info[begin:end])
            begin = end
    return factors, info


def _stored_factors(
    steps: list[LayerStep], columns: list[Tensor], launch: Layers, store: StateStore
) -> tuple[list[Tensor], Tensor]:
    factors = [
        cast("Tensor", store.newest(step.layer, "output_inverse")).to(x.dtype)
        for step, x in zip(steps, columns, strict=True)
    ]
    info = torch.cat([cast("Tensor", store.newest(step.layer, "output_info")).to(torch.int32) for step in steps])
    foreach_whiten_by_(columns, [], factors, info, launch)
    return factors, info
