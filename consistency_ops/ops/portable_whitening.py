"""The operators of ``mode="whiten"`` out of torch's own operations; see ``portable.py``.

The host never waits for a device: what a layer without a gradient keeps is chosen on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import norm_scales
from .portable import foreach_apply_, foreach_covariance, foreach_inverse


def _spread(entries: Sequence[Tensor], owners: Sequence[int], count: int) -> list[list[Tensor]]:
    """By layer: nothing, or its entry."""
    of_layer: list[list[Tensor]] = [[] for _ in range(count)]
    for entry, owner in zip(entries, owners, strict=True):
        of_layer[owner].append(entry)
    return of_layer


def foreach_whiten_(
    grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    row_counts: Sequence[Tensor],
    averages: Sequence[Tensor],
    average_weights: Sequence[Tensor],
    factors: Sequence[Tensor],
    bias_layers: Sequence[int],
    layers: Sequence[int],
    groups: Sequence[int],
    damping: float,
    trace_scaling: bool,
    decay: float,
    chunk: int,
    max_rows: int,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    count = len(grads)
    joined, units = set(bias_layers), [grad.shape[1] for grad in grads]
    dims = [
        1 if grad.dim() > 2 and x.dim() == grad.dim() else x.dim() - 1 for grad, x in zip(grads, inputs, strict=True)
    ]
    bias, every = [i in joined for i in range(count)], list(range(count))
    wide = any(t.dtype == torch.float64 for t in [*grads, *inputs])
    if wide:
        inputs = [x.double() for x in inputs]
    covariances = foreach_covariance(
        inputs, [], row_counts, [], every, layers, groups, dims, units, bias, chunk, max_rows, seed, step
    )
    biases = _spread(bias_grads, bias_layers, count)
    for i, (rows, covariance) in enumerate(zip(row_counts, covariances, strict=True)):
        if not averages:
            covariances[i] = torch.where(rows.view(1, 1, 1) > 0, covariance, torch.nan)
            continue
        seen = [covariance, grads[i], *biases[i]]
        enters = torch.stack([rows.view(()) > 0, *(t.isfinite().all() for t in seen)]).all()
        total, weight = averages[i], average_weights[i]
        torch.where(enters, decay * total + (1 - decay) * covariance, total, out=total)
        torch.where(enters, decay * weight + (1 - decay), weight, out=weight)
        covariances[i] = total / weight
    sizes = [u + b for u, b in zip(units, bias, strict=True)]
    made, info, used = foreach_inverse(covariances, sizes, damping, trace_scaling, chunk, True)
    for factor, values in zip(factors, made, strict=True):
        factor.copy_(values)
    has_gradient = foreach_whiten_by_(grads, bias_grads, factors, info, bias_layers, layers, groups, chunk, seed, step)
    return info, used, has_gradient


def foreach_whiten_by_(
    grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor],
    factors: Sequence[Tensor],
    info: Tensor,
    bias_layers: Sequence[int],
    layers: Sequence[int],
    groups: Sequence[int],
    chunk: int,
    seed: int,
    step: int,
) -> Tensor:
    biases = _spread(bias_grads, bias_layers, len(grads))
    flags = [
        torch.stack([(t != 0).any() for t in (grad, *bias)]).any() for grad, bias in zip(grads, biases, strict=True)
    ]
    transposed = [factor.mT for factor in factors]
    foreach_apply_(grads, bias_grads, transposed, info, [], bias_layers, [], layers, groups, chunk, seed, step)
    return torch.stack(flags).to(torch.int32)


def foreach_unwhiten_(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights_before: Sequence[Tensor],
    biases_before: Sequence[Tensor],
    factors: Sequence[Tensor],
    info: Tensor,
    has_gradient: Tensor,
    bias_layers: Sequence[int],
    layers: Sequence[int],
    groups: Sequence[int],
    keep_norm: bool,
    finish: bool,
    chunk: int,
    seed: int,
    step: int,
) -> Tensor:
    count, dtype = len(weights), factors[0].dtype
    moves, bias_moves = (
        [now.to(dtype) - old.to(dtype) for now, old in zip(after, before, strict=True)]
        for after, before in ((weights, weights_before), (biases, biases_before))
    )
    of_bias = _spread(bias_moves, bias_layers, count)
    of_layer = [[move, *bias] for move, bias in zip(moves, of_bias, strict=True)]
    before_squares = [_sum_of_squares(tensors) for tensors in of_layer]
    foreach_apply_(moves, bias_moves, factors, info, [], bias_layers, [], layers, groups, chunk, seed, step)
    squares = torch.stack([torch.stack(before_squares), torch.stack([_sum_of_squares(t) for t in of_layer])], 1)
    moved = has_gradient > 0
    if finish:
        scale = norm_scales(squares) if keep_norm else torch.ones_like(squares[:, 0])
        for tensors, factor in zip(of_layer, scale.to(dtype), strict=True):
            torch._foreach_mul_(tensors, factor)
        torch._foreach_add_([*moves, *bias_moves], [old.to(dtype) for old in (*weights_before, *biases_before)])
    owners = [*range(count), *bias_layers]
    for owner, now, move in zip(owners, (*weights, *biases), (*moves, *bias_moves), strict=True):
        now.copy_(torch.where(moved[owner], move.to(now.dtype), now))
    return squares.to(dtype)


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.double().square().sum() for t in tensors]).sum()
