"""The stages of the correction one by one: for running averages, stored inverses, and sums over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import Scaling, check_entries, count_chunks, default_group, dense, signed
from .checks import (
    check_chunk,
    check_device,
    check_integers,
    check_layer,
    check_list,
    check_options,
    check_overlap,
    check_permutation,
    check_row_counts,
    check_tensor,
    is_real,
)


def chunked_covariance(
    inputs: Tensor,
    *,
    chunk: int,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
) -> Tensor:
    """Second moments ``X_c^T X_c / n`` of every chunk of units of ``inputs`` (..., units); the mean is not removed.

    The division, the rows and the defaults are those of :func:`precondition` (``group``: of the dtype of ``inputs``).

    Returns:
        (chunks, chunk, chunk), float32 (float64 for float64), in the order of the division; the tails of chunks
        smaller than ``chunk`` are zero.  No rows: all zero.

    Raises:
        As :func:`precondition`.
    """
    op = "chunked_covariance"
    check_chunk(op, chunk, group, max_rows)
    check_integers(op, seed=seed, step=step)
    check_tensor(op, "inputs", inputs)
    if inputs.dim() < 1 or inputs.shape[-1] == 0:
        raise ValueError(f"{op}: inputs must be (..., units) with at least one unit, got {tuple(inputs.shape)}")
    check_device(op, [inputs])
    if permutation is not None:
        permutation = check_permutation(op, permutation, inputs.shape[-1])
    return foreach_covariance(
        [inputs], chunk=chunk, group=group, max_rows=max_rows, permutation=[permutation], seed=seed, step=step
    )[0]


def foreach_covariance(
    inputs: Sequence[Tensor],
    *,
    grads: Sequence[Tensor] | None = None,
    bias: Sequence[bool] | None = None,
    chunk: int = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int = 0,
    layers: Sequence[int] | None = None,
    row_counts: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """First stage of :func:`foreach_precondition_`: each layer's chunked second moments, undamped.

    ``chunk``, ``group``, ``max_rows``, ``permutation``, ``seed``, ``step``, ``layers`` and ``row_counts`` are those of
    :func:`foreach_precondition_`.

    Args:
        inputs: one entry a layer, (..., units), or (N, in, *spatial) where the layer's entry of ``grads`` has as many
            dimensions.
        grads: the gradients that will be corrected; their shapes tell convolutions and their groups, their dtypes the
            default ``group``.  Without them every input is (..., units).
        bias: whether the layer's bias is one more unit.

    Returns:
        A (chunks, chunk, chunk) tensor for each layer, (groups * chunks, chunk, chunk) for a grouped convolution;
        float32, or float64 if any input is float64.

    Raises:
        As :func:`precondition`.
    """
    op = "foreach_covariance"
    check_chunk(op, chunk, group, max_rows)
    check_integers(op, seed=seed, step=step)
    inputs = check_list(op, "inputs", inputs)
    check_entries(op, len(inputs), layers, grads=grads, bias=bias, permutation=permutation, row_counts=row_counts)
    if not inputs:
        return []
    for i, x in enumerate(inputs):
        check_tensor(op, "inputs", x)
        if grads is not None:
            check_layer(op, grads[i], x, None)
        elif not x.dim() or not x.shape[-1]:
            raise ValueError(f"{op}: inputs must be (..., units) with at least one unit, got {tuple(x.shape)}")
    dims, units, groups = [], [], []
    for i, x in enumerate(inputs):
        grad = None if grads is None else grads[i]
        conv = grad is not None and grad.dim() > 2 and x.dim() == grad.dim()
        dims.append(1 if conv else x.dim() - 1)
        units.append(x.shape[-1] if grad is None else grad.shape[1])
        groups.append(default_group((x if grad is None else grad).dtype, chunk) if group is None else group)
    orders, order_layers = dense(permutation)
    counts, count_layers = dense(row_counts)
    check_row_counts(op, counts)
    check_device(op, [*inputs, *counts])
    with torch.no_grad():
        return torch.ops.consistency_ops.foreach_covariance(
            inputs,
            orders,
            counts,
            order_layers,
            count_layers,
            list(range(len(inputs))) if layers is None else list(layers),
            groups,
            dims,
            units,
            [False] * len(inputs) if bias is None else list(bias),
            chunk,
            max_rows,
            signed(seed),
            signed(step),
        )


def foreach_inverse(
    covariances: Sequence[Tensor],
    *,
    units: Sequence[int],
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int = 128,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Second stage: ``(A_c + damping I)^-1`` of the results of :func:`foreach_covariance`, or of averages of them.

    Args:
        covariances: (groups * chunks, ``chunk``, ``chunk``) a layer, contiguous, all float32 or all float64.
        units: of each layer (of one group of a convolution), with the bias.
        damping, scaling: as for :func:`precondition`; ``"trace"`` needs all chunks of a layer together.
        chunk: the one of the covariances.

    Returns:
        ``(inverses, info, damping_used)``, the last two of :func:`foreach_precondition_`; the inverse of a chunk that
        was given up is zero.

    Raises:
        As :func:`precondition`.
    """
    op = "foreach_inverse"
    check_options(op, damping, scaling, chunk, None, 1)
    covariances = check_list(op, "covariances", covariances)
    check_entries(op, len(covariances), None, units=units)
    if not covariances:
        empty = torch.empty(0, dtype=torch.int32)
        return [], empty, empty.float()
    for covariance in covariances:
        check_tensor(op, "covariances", covariance)
    check_device(op, covariances)
    with torch.no_grad():
        return torch.ops.consistency_ops.foreach_inverse(
            covariances, list(units), float(damping), scaling == "trace", chunk
        )


def foreach_apply_(
    grads: Sequence[Tensor],
    inverses: Sequence[Tensor],
    info: Tensor,
    *,
    bias_grads: Sequence[Tensor | None] | None = None,
    chunk: int = 128,
    group: int | None = None,
    permutation: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int = 0,
    layers: Sequence[int] | None = None,
) -> None:
    """Third stage: multiply the gradients in place by the inverses of :func:`foreach_inverse`.

    ``grads`` and ``bias_grads`` (``None`` for layers without) are those of :func:`foreach_precondition_`, ``inverses``
    and ``info`` those of :func:`foreach_inverse`.  ``chunk``, ``group``, ``permutation``, ``seed``, ``step`` and
    ``layers`` must be those of the covariance.  Chunks with ``info != 0`` are left alone.

    Raises:
        As :func:`foreach_precondition_`; nothing has been changed then.
    """
    op = "foreach_apply_"
    check_chunk(op, chunk, group)
    check_integers(op, seed=seed, step=step)
    grads, inverses = check_list(op, "grads", grads), check_list(op, "inverses", inverses)
    check_entries(op, len(grads), layers, inverses=inverses, bias_grads=bias_grads, permutation=permutation)
    if not grads:
        return
    for tensor in (*grads, *inverses):
        check_tensor(op, "grads and inverses", tensor)
    biases, bias_layers = dense(bias_grads)
    check_device(op, [*grads, *biases, *inverses, info])
    orders, order_layers = dense(permutation)
    if is_real(grads[0]):
        check_overlap(op, [*grads, *biases], [])
    groups = [default_group(g.dtype, chunk) if group is None else group for g in grads]
    with torch.no_grad():
        torch.ops.consistency_ops.foreach_apply_(
            grads,
            biases,
            inverses,
            info,
            orders,
            bias_layers,
            order_layers,
            list(range(len(grads))) if layers is None else list(layers),
            groups,
            chunk,
            signed(seed),
            signed(step),
        )


def foreach_correct_(
    grads: Sequence[Tensor],
    covariances: Sequence[Tensor],
    *,
    bias_grads: Sequence[Tensor | None] | None = None,
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int = 128,
    group: int | None = None,
    permutation: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int = 0,
    layers: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Second and third stage in one launch: what :func:`foreach_inverse` and :func:`foreach_apply_` do, bit for bit,
    without the inverses in memory.

    ``grads`` and ``bias_grads`` (``None`` for layers without) are those of :func:`foreach_precondition_`,
    ``covariances``, ``damping`` and ``scaling`` those of :func:`foreach_inverse`.  ``chunk``, ``group``,
    ``permutation``, ``seed``, ``step`` and ``layers`` must be those of the covariance.
    Neighbours with one covariance share its inverse, as in :func:`foreach_precondition_`.

    Returns:
        ``(info, damping_used)``, as :func:`foreach_precondition_`; a layer without outputs is not factored: 0 and
        ``damping``.

    Raises:
        As :func:`foreach_precondition_`; nothing has been changed then.
    """
    op = "foreach_correct_"
    check_options(op, damping, scaling, chunk, group, 1)
    check_integers(op, seed=seed, step=step)
    grads, covariances = check_list(op, "grads", grads), check_list(op, "covariances", covariances)
    check_entries(op, len(grads), layers, covariances=covariances, bias_grads=bias_grads, permutation=permutation)
    if not grads:
        empty = torch.empty(0, dtype=torch.int32)
        return empty, empty.float()
    for tensor in (*grads, *covariances):
        check_tensor(op, "grads and covariances", tensor)
    biases, bias_layers = dense(bias_grads)
    check_device(op, [*grads, *biases, *covariances])
    orders, order_layers = dense(permutation)
    if is_real(grads[0]):
        check_overlap(op, [*grads, *biases], [])
    with torch.no_grad():
        return torch.ops.consistency_ops.foreach_correct_(
            grads,
            biases,
            covariances,
            orders,
            bias_layers,
            order_layers,
            list(range(len(grads))) if layers is None else list(layers),
            [default_group(g.dtype, chunk) if group is None else group for g in grads],
            float(damping),
            scaling == "trace",
            chunk,
            signed(seed),
            signed(step),
        )


@torch.library.register_fake("consistency_ops::foreach_covariance")
def _(
    inputs,
    permutations,
    row_counts,
    permutation_layers,
    row_count_layers,
    layers,
    groups,
    unit_dims,
    units,
    bias,
    chunk,
    max_rows,
    seed,
    step,
):
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    return [
        x.new_empty(x.shape[dim] // u * count_chunks(u + int(b), chunk), chunk, chunk, dtype=dtype)
        for x, dim, u, b in zip(inputs, unit_dims, units, bias, strict=True)
    ]


@torch.library.register_fake("consistency_ops::foreach_inverse")
def _(covariances, units, damping, trace_scaling, chunk):
    total = sum(c.shape[0] for c in covariances)
    first = covariances[0]
    return (
        [torch.empty_like(c) for c in covariances],
        first.new_empty(total, dtype=torch.int32),
        first.new_empty(total, dtype=torch.float32),
    )


@torch.library.register_fake("consistency_ops::foreach_apply_")
def _(
    grads, bias_grads, inverses, info, permutations, bias_layers, permutation_layers, layers, groups, chunk, seed, step
):
    return None


@torch.library.register_fake("consistency_ops::foreach_correct_")
def _(
    grads,
    bias_grads,
    covariances,
    permutations,
    bias_layers,
    permutation_layers,
    layers,
    groups,
    damping,
    trace_scaling,
    chunk,
    seed,
    step,
):
    total = sum(c.shape[0] for c in covariances)
    return grads[0].new_empty(total, dtype=torch.int32), grads[0].new_empty(total, dtype=torch.float32)
