"""The stages of the correction one by one: for running averages, stored inverses, and sums over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import Options, Scaling, check_entries, count_chunks, default_group, dense, layer_numbers, signed
from .backend import call
from .checks import (
    check_device,
    check_layer,
    check_list,
    check_overlap,
    check_permutation,
    check_row_counts,
    check_tensor,
    check_widths,
    is_real,
)
from .registration import register_fake


def chunked_covariance(
    inputs: Tensor,
    *,
    chunk: int | None,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
) -> Tensor:
    """Return the second moments ``X_c^T X_c / n`` of every chunk of units; the mean is not removed.

    Args:
        inputs: ``(..., units)``; every leading position is a row.
        chunk, max_rows, permutation, seed, step: as for :func:`precondition`; they give the same division and the same
            rows.
        group: as for :func:`precondition`, but the default is that of the dtype of ``inputs``.

    Returns:
        ``(chunks, chunk, chunk)``, or ``(1, units, units)`` where ``chunk`` is ``None``; float32 (float64 for float64
        inputs); in the order of the division. A chunk that has fewer units than ``chunk`` ends in rows and columns of
        zeros. Without rows everything is zero.

    Raises:
        The errors of :func:`precondition`.
    """
    options = Options("chunked_covariance", chunk=chunk, group=group, max_rows=max_rows, seed=seed, step=step)
    check_units(options.op, inputs)
    check_device(options.op, [inputs])
    if permutation is not None:
        permutation = check_permutation(options.op, permutation, inputs.shape[-1])
    return _covariances(options, [inputs], None, None, [permutation], None, None)[0]


def foreach_covariance(
    inputs: Sequence[Tensor],
    *,
    grads: Sequence[Tensor] | None = None,
    bias: Sequence[bool] | None = None,
    chunk: int | None = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int = 0,
    layers: Sequence[int] | None = None,
    row_counts: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Compute the first stage of :func:`foreach_precondition_`: the second moments of each layer's chunks, undamped.

    ``chunk``, ``group``, ``max_rows``, ``permutation``, ``seed``, ``step``, ``layers`` and ``row_counts`` are those of
    :func:`foreach_precondition_`.

    Args:
        inputs: one tensor for each layer, ``(..., units)``, or ``(N, in, *spatial)`` if the layer's entry of ``grads``
            has as many dimensions.
        grads: the gradients that will be corrected. Only their shapes and dtypes are used: the shapes tell convolutions
            and their groups, the dtypes the default ``group``. Without them every input is ``(..., units)``.
        bias: for each layer whether its bias is one more unit. Default: no layer's.

    Returns:
        For each layer a tensor ``(chunks, chunk, chunk)``, for a grouped convolution ``(groups * chunks, chunk,
        chunk)``; float32, or float64 if any input is float64.

    Raises:
        The errors of :func:`precondition`.
    """
    options = Options("foreach_covariance", chunk=chunk, group=group, max_rows=max_rows, seed=seed, step=step)
    op = options.op
    inputs = check_list(op, "inputs", inputs)
    check_entries(op, len(inputs), layers, grads=grads, bias=bias, permutation=permutation, row_counts=row_counts)
    if not inputs:
        return []
    for i, x in enumerate(inputs):
        if grads is not None:
            check_layer(op, grads[i], x, None)
        else:
            check_units(op, x)
    return _covariances(options, inputs, grads, bias, permutation, layers, row_counts)


def _covariances(
    options: Options,
    inputs: list[Tensor],
    grads: Sequence[Tensor] | None,
    bias: Sequence[bool] | None,
    permutation: Sequence[Tensor | None] | None,
    layers: Sequence[int] | None,
    row_counts: Sequence[Tensor | None] | None,
) -> list[Tensor]:
    chunk, group = options.chunk or 0, options.group
    dims, units, groups = [], [], []
    for i, x in enumerate(inputs):
        grad = None if grads is None else grads[i]
        conv = grad is not None and grad.dim() > 2 and x.dim() == grad.dim()
        dims.append(1 if conv else x.dim() - 1)
        units.append(x.shape[-1] if grad is None else grad.shape[1])
        groups.append(default_group((x if grad is None else grad).dtype, chunk) if group is None else group)
    joined = [False] * len(inputs) if bias is None else list(bias)
    check_widths(options.op, options.chunk, (u + b for u, b in zip(units, joined, strict=True)))
    orders, order_layers = dense(permutation)
    counts, count_layers = dense(row_counts)
    check_row_counts(options.op, counts)
    check_device(options.op, [*inputs, *counts])
    with torch.no_grad():
        covariances: list[Tensor] = call(
            "foreach_covariance",
            chunk,
            inputs,
            inputs,
            orders,
            counts,
            order_layers,
            count_layers,
            layer_numbers(layers, len(inputs)),
            groups,
            dims,
            units,
            joined,
            chunk,
            options.max_rows,
            signed(options.seed),
            signed(options.step),
        )
    return covariances


def check_units(op: str, inputs: Tensor) -> None:
    """Raise unless ``inputs`` is a tensor ``(..., units)`` with at least one unit."""
    check_tensor(op, "inputs", inputs)
    if not inputs.dim() or not inputs.shape[-1]:
        raise ValueError(f"{op}: inputs must be (..., units) with at least one unit, got {tuple(inputs.shape)}")


def foreach_inverse(
    covariances: Sequence[Tensor],
    *,
    units: Sequence[int],
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int | None = 128,
    triangular: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Compute the second stage: ``(A_c + damping I)^-1`` of every chunk.

    Args:
        covariances: the results of :func:`foreach_covariance`, or averages of them: for each layer ``(groups * chunks,
            chunk, chunk)``, contiguous, all float32 or all float64.
        units: the number of units of each layer, the bias included; for a grouped convolution that of one group.
        damping, scaling: as for :func:`precondition`. ``"trace"`` needs all chunks of a layer together.
        chunk: that of the covariances.
        triangular: return ``L^-1``, lower triangular, of the Cholesky factorisation ``L L^T = A_c + damping I`` instead
            of the inverse.

    Returns:
        ``(inverses, info, damping_used)``. The inverse of a chunk that was given up is zero. ``info`` and
        ``damping_used`` are those of :func:`foreach_precondition_`.

    Raises:
        The errors of :func:`precondition`.
    """
    options = Options("foreach_inverse", damping, scaling, chunk)
    op = options.op
    covariances = check_list(op, "covariances", covariances)
    check_entries(op, len(covariances), None, units=units)
    if not covariances:
        empty = torch.empty(0, dtype=torch.int32)
        return [], empty, empty.float()
    for covariance in covariances:
        check_tensor(op, "covariances", covariance)
    check_device(op, covariances)
    with torch.no_grad():
        results: tuple[list[Tensor], Tensor, Tensor] = call(
            "foreach_inverse",
            chunk or 0,
            covariances,
            covariances,
            list(units),
            float(damping),
            scaling == "trace",
            chunk or 0,
            triangular,
        )
    return results


def foreach_apply_(
    grads: Sequence[Tensor],
    inverses: Sequence[Tensor],
    info: Tensor,
    *,
    bias_grads: Sequence[Tensor | None] | None = None,
    chunk: int | None = 128,
    group: int | None = None,
    permutation: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int = 0,
    layers: Sequence[int] | None = None,
    triangular: bool = False,
) -> None:
    """Compute the third stage: multiply the gradients in place by the inverses of :func:`foreach_inverse`.

    ``grads`` and ``bias_grads`` (``None`` for a layer without) are those of :func:`foreach_precondition_`. ``chunk``,
    ``group``, ``permutation``, ``seed``, ``step`` and ``layers`` must be those with which the covariances were
    computed.

    Args:
        inverses, info: the results of :func:`foreach_inverse`. Chunks with ``info != 0`` are left alone.
        triangular: the matrices are not symmetric; ``G[:, c]`` becomes ``G[:, c] @ inverses[c]`` all the same. The
            transpose of ``L^-1`` whitens a gradient, and ``L^-1`` maps a displacement of whitened weights back.

    Raises:
        The errors of :func:`foreach_precondition_`. Nothing has been changed then.
    """
    op = "foreach_apply_"
    Options(op, chunk=chunk, group=group, seed=seed, step=step)
    grads, inverses, biases, bias_layers = _check_written(
        op, grads, "inverses", inverses, bias_grads, permutation, layers, info
    )
    if not grads:
        return
    orders, order_layers = dense(permutation)
    with torch.no_grad():
        call(
            "foreach_apply_",
            chunk or 0,
            [*grads, *inverses],
            grads,
            biases,
            inverses,
            info,
            orders,
            bias_layers,
            order_layers,
            layer_numbers(layers, len(grads)),
            [default_group(g.dtype, chunk or 0) if group is None else group for g in grads],
            chunk or 0,
            signed(seed),
            signed(step),
            triangular,
            cuda_kernel=not triangular,
        )


def foreach_correct_(
    grads: Sequence[Tensor],
    covariances: Sequence[Tensor],
    *,
    bias_grads: Sequence[Tensor | None] | None = None,
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int | None = 128,
    group: int | None = None,
    permutation: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int = 0,
    layers: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the second and the third stage in one launch, without the inverses in memory.

    The result is, bit for bit, that of :func:`foreach_inverse` and :func:`foreach_apply_`. ``grads`` and ``bias_grads``
    (``None`` for a layer without) are those of :func:`foreach_precondition_`, ``covariances``, ``damping`` and
    ``scaling`` those of :func:`foreach_inverse`. ``chunk``, ``group``, ``permutation``, ``seed``, ``step`` and
    ``layers`` must be those with which the covariances were computed. Consecutive layers that get the same tensor as
    covariance share its inverse, as in :func:`foreach_precondition_`.

    Returns:
        ``(info, damping_used)``, as for :func:`foreach_precondition_`. A layer without outputs is not factored: its
        entries are 0 and ``damping``.

    Raises:
        The errors of :func:`foreach_precondition_`. Nothing has been changed then.
    """
    op = "foreach_correct_"
    Options(op, damping, scaling, chunk, group, seed=seed, step=step)
    grads, covariances, biases, bias_layers = _check_written(
        op, grads, "covariances", covariances, bias_grads, permutation, layers
    )
    if not grads:
        empty = torch.empty(0, dtype=torch.int32)
        return empty, empty.float()
    orders, order_layers = dense(permutation)
    with torch.no_grad():
        results: tuple[Tensor, Tensor] = call(
            "foreach_correct_",
            chunk or 0,
            [*grads, *covariances],
            grads,
            biases,
            covariances,
            orders,
            bias_layers,
            order_layers,
            layer_numbers(layers, len(grads)),
            [default_group(g.dtype, chunk or 0) if group is None else group for g in grads],
            float(damping),
            scaling == "trace",
            chunk or 0,
            signed(seed),
            signed(step),
        )
    return results


def _check_written(
    op: str,
    grads: Sequence[Tensor],
    name: str,
    matrices: Sequence[Tensor],
    bias_grads: Sequence[Tensor | None] | None,
    permutation: Sequence[Tensor | None] | None,
    layers: Sequence[int] | None,
    *others: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Check the arguments of a stage that writes gradients: ``name`` is that of ``matrices``, one for each layer.

    Returns the gradients and the matrices as lists, the gradients of biases that exist, and their layers.
    """
    grads, matrices = check_list(op, "grads", grads), check_list(op, name, matrices)
    lists = {name: matrices, "bias_grads": bias_grads, "permutation": permutation}
    check_entries(op, len(grads), layers, **lists)
    for tensor in (*grads, *matrices):
        check_tensor(op, f"grads and {name}", tensor)
    biases, bias_layers = dense(bias_grads)
    if grads:
        check_device(op, [*grads, *biases, *matrices, *others])
        if is_real(grads[0]):
            check_overlap(op, [*grads, *biases], [])
    return grads, matrices, biases, bias_layers


@register_fake("foreach_covariance")
def _(
    inputs: list[Tensor],
    permutations: list[Tensor],
    row_counts: list[Tensor],
    permutation_layers: list[int],
    row_count_layers: list[int],
    layers: list[int],
    groups: list[int],
    unit_dims: list[int],
    units: list[int],
    bias: list[bool],
    chunk: int,
    max_rows: int,
    seed: int,
    step: int,
) -> list[Tensor]:
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    return [
        x.new_empty(
            x.shape[dim] // u * count_chunks(u + int(b), chunk), chunk or u + int(b), chunk or u + int(b), dtype=dtype
        )
        for x, dim, u, b in zip(inputs, unit_dims, units, bias, strict=True)
    ]


@register_fake("foreach_inverse")
def _(
    covariances: list[Tensor],
    units: list[int],
    damping: float,
    trace_scaling: bool,
    chunk: int,
    triangular: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor]:
    return [torch.empty_like(c) for c in covariances], *_results(covariances)


@register_fake("foreach_apply_")
def _(
    grads: list[Tensor],
    bias_grads: list[Tensor],
    inverses: list[Tensor],
    info: Tensor,
    permutations: list[Tensor],
    bias_layers: list[int],
    permutation_layers: list[int],
    layers: list[int],
    groups: list[int],
    chunk: int,
    seed: int,
    step: int,
    triangular: bool = False,
) -> None:
    return None


@register_fake("foreach_correct_")
def _(
    grads: list[Tensor],
    bias_grads: list[Tensor],
    covariances: list[Tensor],
    permutations: list[Tensor],
    bias_layers: list[int],
    permutation_layers: list[int],
    layers: list[int],
    groups: list[int],
    damping: float,
    trace_scaling: bool,
    chunk: int,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    return _results(covariances)


def _results(covariances: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Empty ``info`` and ``damping_used``."""
    total = sum(c.shape[0] for c in covariances)
    first = covariances[0]
    return first.new_empty(total, dtype=torch.int32), first.new_empty(total, dtype=torch.float32)
