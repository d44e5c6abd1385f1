"""Condition numbers of the matrices that the last step inverted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..engine.capture import Capture
from ..engine.correction import Correction
from ..engine.layer import Layer
from ..reference import trace_scale_of


@torch.no_grad()
def condition_numbers(correction: Correction, layers: list[Layer], of: list[Layer]) -> dict[str, float]:
    """The largest 1-norm condition number of the damped chunks of every layer, by name.

    It is infinite where a chunk was given up. The matrices are those of the last inversion: from the rows that are
    still in the buffers, with the division they had then, or from the running average. The number is exact,
    ``norm(M) * norm(M^-1)``, and takes about as much work as a correction. Layers without rows (a state that was
    loaded) and layers whose chunks are too large for the kernels are left out.

    Args:
        correction: the one that inverted them.
        layers: all layers, by index; some share the rows of others.
        of: the layers that are asked for.
    """
    batches: dict[tuple[torch.device, bool, int], list[Layer]] = {}
    for layer in of:
        capture, chunk = _capture(layer), correction.chunk_of(_units(layer), layer.num_groups)
        if capture.state is not None and chunk <= ops.MAX_CHUNK and _matrix(layer).numel() > 0:
            rows = capture.buffer
            batches.setdefault((rows.device, rows.dtype == torch.float64, chunk), []).append(layer)
    found: dict[str, Tensor] = {}
    for (*_, chunk), batch in batches.items():
        found.update(_largest(correction, layers, batch, chunk))
    if not found:
        return {}
    return dict(zip(found, torch.stack([value.double().cpu() for value in found.values()]).tolist(), strict=True))


def _largest(correction: Correction, layers: list[Layer], of: list[Layer], chunk: int) -> dict[str, Tensor]:
    """Layers on one device, of one precision, with chunks of one size."""
    options = correction.options
    covariances = _covariances(correction, layers, of, chunk)
    units = [_units(layer) for layer in of]
    inverses, info, used = ops.foreach_inverse(
        covariances, units=units, damping=correction.last_damping, scaling=options.scaling, chunk=chunk
    )
    sizes = [len(covariance) for covariance in covariances]
    eye = torch.eye(chunk, dtype=covariances[0].dtype, device=covariances[0].device)
    found = {}
    for layer, size, n, matrix, inverse, failed, damping in zip(
        of, sizes, units, covariances, inverses, torch.split(info, sizes), torch.split(used, sizes), strict=True
    ):
        if options.scaling == "trace":
            tau = trace_scale_of(matrix.diagonal(dim1=1, dim2=2).reshape(layer.num_groups, -1), n)
            matrix = matrix / tau.repeat_interleave(size // layer.num_groups)[:, None, None]
        damped = matrix + damping[:, None, None] * eye
        number = damped.abs().sum(1).amax(1) * inverse.abs().sum(1).amax(1)
        found[layer.name] = torch.where(failed == 0, number, math.inf).max()
    return found


def _covariances(correction: Correction, layers: list[Layer], of: list[Layer], chunk: int) -> list[Tensor]:
    if correction.options.decay > 0:
        return [correction.stored_average(layer) for layer in of]
    rows, row_counts = [], []
    for layer in of:
        source = _capture(layers[_capture(layer).last_source])
        rows.append(source.buffer)
        row_counts.append(source.states.last_count(rows[-1].device, source.index))
    return correction.covariances_of(
        rows=rows,
        row_counts=row_counts,
        matrices=[_matrix(layer) for layer in of],
        biases=[_units(layer) > _matrix(layer).shape[1] for layer in of],
        division_step=correction.last_division_step,
        division_ids=[layer.division_id for layer in of],
        chunk=chunk,
    )


def _capture(layer: Layer) -> Capture:
    assert layer.capture is not None
    return layer.capture


def _units(layer: Layer) -> int:
    """Units of the matrices that were inverted; the bias is one of them only if it had a gradient then."""
    return layer.units if layer.inverse_units is None else layer.inverse_units


def _matrix(layer: Layer) -> Tensor:
    """The weight in the shape that this rank corrects, but for the number of rows; empty where it has none."""
    module, weight = layer.module(), layer.weight
    assert module is not None and weight is not None
    matrix = layer.kind.local_view(module, weight.detach())
    units = layer.units - layer.joins_bias
    return matrix if matrix.shape[1] == units else matrix.new_empty(1, units, *matrix.shape[2:])
