"""Condition numbers of the matrices that the last step inverted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops

if TYPE_CHECKING:
    from ..engine.layer import Layer
    from ..preconditioner import Preconditioner


@torch.no_grad()
def conditions(pre: Preconditioner, layers: list[Layer]) -> dict[str, float]:
    """The largest 1-norm condition number of the damped chunks of every layer; infinite where one was given up.

    From the rows that are still in the buffers, with the division of the last inversion, or from the running average.
    Exact, ``norm(M) * norm(M^-1)``, and about as much work as a correction. Layers without rows (a state that was
    loaded) or with chunks that are too large for the kernels are left out.
    """
    found: dict[str, Tensor] = {}
    batches: dict[tuple, list[Layer]] = {}
    for layer in layers:
        capture = layer.capture
        weight = _matrix(layer)
        if pre.chunk_of(layer.units) <= ops.MAX_CHUNK and weight.numel() > 0:
            key = capture.rows.device, capture.rows.dtype, pre.chunk_of(layer.units)
            batches.setdefault(key, []).append(layer)
    for (*_, chunk), batch in batches.items():
        found.update(_conditions(pre, batch, chunk))
    if not found:
        return {}
    return dict(zip(found, torch.stack([value.double().cpu() for value in found.values()]).tolist(), strict=True))


def _conditions(pre: Preconditioner, layers: list[Layer], chunk: int) -> dict[str, Tensor]:
    weights = [_matrix(layer) for layer in layers]
    biases = [layer.joins_bias for layer in layers]
    covariances = _averages(pre, layers)
    if covariances is None:
        sources = [pre.layers[layer.capture.last_source].capture for layer in layers]
        covariances = ops.foreach_covariance(
            [source.rows for source in sources],
            grads=weights,
            bias=biases,
            chunk=chunk,
            group=pre.group,
            max_rows=pre.max_rows,
            seed=pre.seed,
            step=pre.last_division,
            layers=[layer.divided_as for layer in layers],
            row_counts=[source.states.last_count(source.rows.device, source.index) for source in sources],
        )
    units = [weight.shape[1] + bias for weight, bias in zip(weights, biases, strict=True)]
    inverses, info, used = ops.foreach_inverse(
        covariances, units=units, damping=pre.last_damping, scaling=pre.scaling, chunk=chunk
    )
    sizes = [len(covariance) for covariance in covariances]
    found = {}
    for layer, size, n, matrix, inverse, failed, damping in zip(
        layers, sizes, units, covariances, inverses, info.split(sizes), used.split(sizes), strict=True
    ):
        if pre.scaling == "trace":
            groups = layer.kind.groups(layer.module())
            tau = matrix.diagonal(dim1=1, dim2=2).reshape(groups, -1).sum(1) / n
            matrix = matrix / tau.repeat_interleave(size // groups)[:, None, None]
        damped = matrix + damping[:, None, None] * torch.eye(chunk, dtype=matrix.dtype, device=matrix.device)
        number = damped.abs().sum(1).amax(1) * inverse.abs().sum(1).amax(1)
        found[layer.name] = torch.where(failed == 0, number, math.inf).max()
    return found


def _matrix(layer: Layer) -> Tensor:
    """Of the shape that this rank corrects, but for the number of rows; empty where it has none."""
    weight = layer.kind.local_view(layer.module(), layer.weight.detach())
    units = layer.units - layer.joins_bias
    return weight if weight.shape[1] == units else weight.new_empty(1, units, *weight.shape[2:])


def _averages(pre: Preconditioner, layers: list[Layer]) -> list[Tensor] | None:
    if pre.decay == 0:
        return None
    states = [pre.stored(layer) for layer in layers]
    return [state["covariance"] / state["weight"] for state in states]
