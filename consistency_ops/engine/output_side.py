"""The other side of ``mode="whiten"``: gradients are whitened over a layer's outputs, too.

With ``G`` in the whitened coordinates of the inputs (``whitening.py``), its columns are taken as rows of data: their
damped running second moment ``B = K K^T``, by chunks of outputs, gives the optimizer ``K^-1 G``, and its displacement
``D`` is mapped back to ``K^-T D``. It is the same arithmetic on the transposed matrices, so the same operators do it.
Nothing is captured in the backward pass.

Where output rows are dealt to ranks (``fully_shard``, column-parallel layers), every rank gathers the whole gradient,
one layer at a time, whitens it and keeps its own rows: what it gathers is the same everywhere, so the factors are. The
displacement is gathered likewise. Of a layer whose units are dealt (row-parallel) the outputs are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from .. import ops
from ..ops.whitening import Layers, foreach_multiply_, foreach_unwhiten_, foreach_whiten_, foreach_whiten_by_
from .dtensors import deals_rows, is_dtensor, redistributed, replicated, row_placements
from .layer import Layer
from .layer_step import LayerStep
from .layer_types import InProjection
from .state import StateStore

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .options import CorrectionOptions

T = TypeVar("T", Tensor, "Tensor | None")
Matrix = tuple[Tensor, Tensor | None]  # (outputs, inputs) or (outputs, inputs, *kernel), and the bias, one more column


@dataclass(frozen=True)
class DealtRows:
    """The rows of a layer's matrix and of its bias that this rank has, and all of them."""

    weight: DTensor  # as a matrix
    bias: DTensor | None

    def gathered(self, part: Matrix) -> Matrix:
        weight, bias = part
        return self._moved(weight, self.weight, whole=True), self._moved(bias, self.bias, whole=True)

    def part_of(self, whole: Matrix) -> Matrix:
        weight, bias = whole
        return self._moved(weight, self.weight, whole=False), self._moved(bias, self.bias, whole=False)

    def _moved(self, values: T, like: DTensor | None, *, whole: bool) -> T:
        if values is None or like is None:
            return values
        dealt, everywhere = row_placements(like), replicated(like)
        return redistributed(values, like, *((dealt, everywhere) if whole else (everywhere, dealt)))


def dealt_rows(layer: Layer, *, exchanged: bool) -> DealtRows | None:
    """How the output rows of a layer are dealt to ranks; None if they cannot be gathered.

    The layer's bias, if it is joined, is dealt in the same way.

    Args:
        exchanged: whether units that are dealt to ranks are exchanged for rows.
    """
    module, weight, kind = layer.module(), layer.weight, layer.kind
    if module is None or weight is None or isinstance(kind, InProjection) or kind.copies(module):
        return None  # a part of a parameter may begin inside of a shard
    view = kind.view(module, weight.detach())
    if not is_dtensor(view) or not deals_rows(row_placements(view) if exchanged else view.placements):
        return None
    bias = module._parameters.get(kind.bias) if kind.bias is not None else None
    return DealtRows(view, bias.detach() if is_dtensor(bias) else None)


@dataclass(eq=False)
class OutputSide:
    """The layers of one launch that were whitened over their outputs, until the optimizer has made its step."""

    places: list[int]  # of its layers among those of the launch over the inputs
    launch: Layers
    factors: list[Tensor]  # K^-1 of every layer, (chunks, chunk, chunk)
    info: Tensor
    has_gradient: Tensor  # int32, one entry a layer
    dealt: DealtRows | None  # of its only layer

    @property
    def dtype(self) -> torch.dtype:
        return self.factors[0].dtype

    def map_back_(self, now: list[Matrix], before: list[Matrix], *, keep_norm: bool) -> None:
        """Replace every displacement ``D``, ``now - before``, by ``K^-T D``, with the norm of ``D`` if it is kept."""
        if self.dealt is not None:
            self._map_dealt_back_(self.dealt, now[self.places[0]], before[self.places[0]], keep_norm=keep_norm)
            return
        after = self._columns(now)
        self._map_columns_back_(after, self._columns(before), keep_norm=keep_norm)
        self._write(after, now)

    def _map_dealt_back_(self, dealt: DealtRows, now: Matrix, before: Matrix, *, keep_norm: bool) -> None:
        """What is sent is the displacement, and not both weights."""
        (weight, bias), (old_weight, old_bias) = now, before
        moved_bias = None if bias is None or old_bias is None else bias.to(self.dtype) - old_bias
        columns = columns_of(dealt.gathered((weight.to(self.dtype) - old_weight, moved_bias)), self.dtype)
        self._map_columns_back_([columns], [torch.zeros_like(columns)], keep_norm=keep_norm)
        new = dealt.part_of(matrix_of(columns, dealt.weight.shape))
        for value, old, move in zip(now, before, new, strict=True):
            if value is not None and old is not None and move is not None:
                value.copy_(torch.where(self.has_gradient > 0, old + move, value.to(self.dtype)))

    def _map_columns_back_(self, after: list[Tensor], before: list[Tensor], *, keep_norm: bool) -> None:
        foreach_unwhiten_(
            after, [], before, [], self.factors, self.info, self.has_gradient, self.launch, keep_norm=keep_norm
        )

    def multiply_(self, matrices: list[Matrix]) -> None:
        """Replace every matrix ``W`` by ``K^T W``."""
        columns = self._columns(matrices)
        foreach_multiply_(columns, [], [inverse_of_lower(factor) for factor in self.factors], self.info, self.launch)
        self._write(columns, matrices)

    def _columns(self, matrices: list[Matrix]) -> list[Tensor]:
        parts = [matrices[place] for place in self.places]
        return [columns_of(part if self.dealt is None else self.dealt.gathered(part), self.dtype) for part in parts]

    def _write(self, columns: Iterable[Tensor], matrices: list[Matrix]) -> None:
        for place, values in zip(self.places, columns, strict=True):
            write_columns(matrices[place], values, self.dealt)


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


def matrix_of(columns: Tensor, shape: torch.Size) -> Matrix:
    """The opposite of :func:`columns_of`: a weight of this shape, and a bias if there is one column more."""
    units = math.prod(shape[1:])
    return columns[:units].T.reshape(shape), columns[units] if len(columns) > units else None


def write_columns(matrix: Matrix, columns: Tensor, dealt: DealtRows | None = None) -> None:
    """Copy :func:`matrix_of` the columns; of one whose rows are dealt to ranks this rank's part."""
    if dealt is None:
        values = matrix_of(columns, matrix[0].shape)
    else:
        values = dealt.part_of(matrix_of(columns, dealt.weight.shape))
    for old, new in zip(matrix, values, strict=True):
        if old is not None and new is not None:
            old.copy_(new)


def whiten_outputs(
    steps: list[LayerStep],
    has_gradient: Tensor,
    store: StateStore,
    options: CorrectionOptions,
    chunk_of: Callable[[int], int],
    damping: float | None,
) -> list[OutputSide]:
    """Whiten gradients that are whitened over the inputs already; those whose units are dealt to ranks stay.

    Args:
        has_gradient: int32, one entry a layer.
        chunk_of: the largest chunk for so many outputs.
        damping: for new factors; ``None``: those of the last refresh are used. A layer that has none waits.
    """
    flags = has_gradient.unbind()
    launches: dict[tuple[int, int], tuple[list[int], DealtRows | None]] = {}
    for i, step in enumerate(steps):
        if damping is None and store.newest(step.layer, "output_inverse") is None:
            continue
        if not is_dtensor(step.weight):
            if step.grad.numel():
                launches.setdefault((chunk_of(len(step.grad)), -1), ([], None))[0].append(i)
        elif (dealt := dealt_rows(step.layer, exchanged=step.layer.index not in store.shards)) is not None:
            # One by one: for the whole gradients of all layers at once the ranks may have no memory.
            launches[chunk_of(len(dealt.weight)), i] = [i], dealt
    sides = []
    for (chunk, _), (places, dealt) in launches.items():
        some, dtype = [steps[i] for i in places], steps[places[0]].compute_dtype
        matrices: list[Matrix] = [(step.grad, step.bias_grad) for step in some]
        columns = [columns_of(m if dealt is None else dealt.gathered(m), dtype) for m in matrices]
        group = ops.default_group(dtype, chunk) if options.group is None else min(options.group, chunk)
        indices = [step.layer.index for step in some]
        launch = Layers([], indices, [group] * len(some), chunk, options.seed, 0)  # the division is fixed
        seen = torch.stack([flags[i] for i in places])
        if damping is None:
            factors, info = _stored_factors(some, columns, launch, store)
        else:
            factors, info = _new_factors(some, columns, launch, store, options, damping, seen)
        sides.append(OutputSide(places, launch, factors, info, seen, dealt))
        for matrix, values in zip(matrices, columns, strict=True):
            write_columns(matrix, values, dealt)
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


def inverse_of_lower(factor: Tensor) -> Tensor:
    """Of padding and chunks that were given up, which are zero, the identity."""
    eye = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    diagonal = (factor.diagonal(dim1=1, dim2=2) == 0).to(factor.dtype)
    result: Tensor = torch.linalg.solve_triangular(factor + torch.diag_embed(diagonal), eye, upper=False)
    return result.contiguous()
