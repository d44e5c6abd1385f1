"""The functional API: the correction of arXiv 1708.00631 for one layer, for all layers, and stage by stage.

Checks that a user can trip are Python exceptions (``_checks.py``); the compiled operators
(``torch.ops.consistency_ops``) check what memory safety needs, and compute.  The functions of the correction are not
differentiable: they work on gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from consistency_ops import _library  # noqa: F401  (loading registers the operators)
from consistency_ops._checks import (
    MAX_CHUNK,
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
from consistency_ops.batch_rms_norm import batch_rms_norm
from consistency_ops.modulus import modulus

__all__ = [
    "MAX_CHUNK",
    "batch_rms_norm",
    "chunked_covariance",
    "foreach_apply_",
    "foreach_correct_",
    "foreach_covariance",
    "foreach_inverse",
    "foreach_precondition_",
    "modulus",
    "precondition",
    "precondition_ex",
]

Scaling = Literal["absolute", "trace"]
_SECTOR = 32  # bytes: the unit in which GPUs move memory; the default group is one sector of the gradient


def default_group(dtype: torch.dtype, chunk: int) -> int:
    """Units of a gradient that fill one sector."""
    return min(_SECTOR // dtype.itemsize, chunk)


def _signed(seed: int) -> int:
    return (int(seed) + 2**63) % 2**64 - 2**63


def _dense(entries: Sequence[Tensor | None] | None) -> tuple[list[Tensor], list[int]]:
    """The entries that are there, and the layers they belong to: the form that operator schemas can carry."""
    if entries is None:
        return [], []
    present = [(entry, i) for i, entry in enumerate(entries) if entry is not None]
    return [entry for entry, _ in present], [i for _, i in present]


def _check_entries(op: str, count: int, layers: Sequence[int] | None, **lists: Sequence | None) -> None:
    """Every list that is given has one entry a layer."""
    for name, entries in {**lists, "layers": layers}.items():
        if entries is not None:
            check_list(op, name, entries, count)
    for layer in layers or ():
        check_integers(op, layers=layer)


# The correction


def foreach_precondition_(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    bias_grads: Sequence[Tensor | None] | None = None,
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int = 0,
    layers: Sequence[int] | None = None,
    row_counts: Sequence[Tensor | None] | None = None,
    return_damping: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Correct the gradients of all layers in place, in one call: ``G[:, c] <- G[:, c] (X_c^T X_c / n + damping I)^-1``.

    Args are those of :func:`precondition`; ``grads``, ``inputs``, ``bias_grads``, ``permutation``, ``layers`` and
    ``row_counts`` have one entry a layer, which may be ``None`` in ``bias_grads``, ``permutation`` and ``row_counts``.

    Args:
        layers: third argument of the random division, next to ``seed`` and ``step``; default: the position in the list.
            Neighbours in the list with one input (query, key and value projections) and one number here share one
            covariance and one inverse, if their ``group``, ``permutation``, ``row_counts`` and having a bias are the
            same, too; not the groups of a convolution. Results are those of an input each, but for rounding on CUDA;
            a layer without outputs has the ``info`` of the first.
        row_counts: one-element int64 tensors; only so many leading rows of that input are used.
        return_damping: also return the damping used.

    Returns:
        ``info``, int32, one entry a chunk in the order of the layers (and of the groups of a convolution): 0, or the
        order of the leading minor that was not positive definite when the chunk was given up and its gradient left
        unchanged. With ``return_damping``: ``(info, damping_used)``.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: shapes, ranges, dtypes, devices, overlapping
            gradients; nothing has been changed then.
    """
    return _foreach_precondition_(
        "foreach_precondition_",
        grads,
        inputs,
        bias_grads,
        damping,
        scaling,
        chunk,
        group,
        max_rows,
        permutation,
        seed,
        step,
        layers,
        row_counts,
        return_damping,
    )


def _foreach_precondition_(
    op: str,
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    bias_grads: Sequence[Tensor | None] | None,
    damping: float,
    scaling: str,
    chunk: int,
    group: int | None,
    max_rows: int,
    permutations: Sequence[Tensor | None] | None,
    seed: int,
    step: int,
    layers: Sequence[int] | None,
    row_counts: Sequence[Tensor | None] | None,
    return_damping: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    check_options(op, damping, scaling, chunk, group, max_rows)
    check_integers(op, seed=seed, step=step)
    grads, inputs = check_list(op, "grads", grads), check_list(op, "inputs", inputs)
    _check_entries(
        op, len(grads), layers, inputs=inputs, bias_grads=bias_grads, permutation=permutations, row_counts=row_counts
    )
    if not grads:
        empty = torch.empty(0, dtype=torch.int32)
        return (empty, empty.float()) if return_damping else empty
    for i, grad in enumerate(grads):
        check_layer(op, grad, inputs[i], bias_grads[i] if bias_grads is not None else None)
    biases, bias_layers = _dense(bias_grads)
    counts, count_layers = _dense(row_counts)
    check_row_counts(op, counts)
    check_device(op, [*grads, *inputs, *biases, *counts])
    if permutations is not None:
        has_bias = set(bias_layers)
        permutations = [
            None if p is None else check_permutation(op, p, grads[i].shape[1] + (i in has_bias))
            for i, p in enumerate(permutations)
        ]
    orders, order_layers = _dense(permutations)
    if is_real(grads[0]):
        inputs = check_overlap(op, [*grads, *biases], inputs)
    groups = [default_group(g.dtype, chunk) if group is None else group for g in grads]
    with torch.no_grad():
        info, used = torch.ops.consistency_ops.foreach_precondition_(
            grads,
            biases,
            inputs,
            orders,
            counts,
            bias_layers,
            order_layers,
            count_layers,
            list(range(len(grads))) if layers is None else list(layers),
            groups,
            float(damping),
            scaling == "trace",
            chunk,
            max_rows,
            _signed(seed),
            _signed(step),
            # Of products of float32 on CUDA; the CPU computes in float32 always.
            grads[0].is_cuda and torch.get_float32_matmul_precision() != "highest",
        )
    return (info, used) if return_damping else info


def precondition_ex(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    bias_grad: Tensor | None = None,
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor]:
    """:func:`precondition`, and what became of every chunk.

    Returns:
        ``(corrected, info, damping_used)``.  ``info``: int32, (chunks,): 0, or the order of the leading minor of the
        damped chunk that is not positive definite, as in ``torch.linalg.cholesky_ex``, when the chunk was given up.
        ``damping_used``: float32, (chunks,): ``damping``, or 10 or 100 times that where the factorisation had failed.
        With ``bias_grad``, ``corrected`` is ``(corrected, corrected_bias)``.
    """
    return _precondition(
        "precondition_ex", grad, inputs, damping, scaling, chunk, group, max_rows, permutation, seed, step, bias_grad
    )


def _precondition(
    op: str,
    grad: Tensor,
    inputs: Tensor,
    damping: float,
    scaling: str,
    chunk: int,
    group: int | None,
    max_rows: int,
    permutation: Tensor | None,
    seed: int,
    step: int,
    bias_grad: Tensor | None,
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor]:
    check_options(op, damping, scaling, chunk, group, max_rows)
    check_layer(op, grad, inputs, bias_grad)
    corrected = grad.detach().clone()
    bias = None if bias_grad is None else bias_grad.detach().clone()
    info, used = _foreach_precondition_(
        op,
        [corrected],
        [inputs],
        None if bias is None else [bias],
        damping,
        scaling,
        chunk,
        group,
        max_rows,
        None if permutation is None else [permutation],
        seed,
        step,
        None,
        None,
        True,
    )
    return (corrected if bias is None else (corrected, bias)), info, used


def precondition(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    bias_grad: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The second-order correction of one layer: ``G[:, c] (X_c^T X_c / n + damping I)^-1`` for every chunk c of units.

    The normal equations of the layer's local linear model (arXiv 1708.00631): the gradient is
    multiplied from the right by the inverse damped second moment of the layer's input, on a uniform subsample of the
    rows and a random division of the units.

    Args:
        grad: weight gradient, (out, in), or (out, in / groups, *kernel) of a convolution with up to three kernel
            dimensions.  float32, float64, bfloat16 or float16; any strides.
        inputs: what the layer saw, (..., in), or (N, in, *spatial) in any memory format, or (rows, in).  Every leading
            or spatial position is a row; of a convolution, units are input channels and every tap and output is a row
            of grad. May differ from ``grad`` in dtype.  Sums are float32, or float64 if either is float64.
        damping: lambda, at least 0.
        scaling: ``"absolute"``: ``A + damping I`` (the paper).  ``"trace"``: ``A / tau + damping I`` with
            ``tau = trace(A) / units`` of the layer (of each group of a convolution), which keeps the corrected
            gradient on the scale of the gradient.
        chunk: largest number of units that are inverted together, 1 to 256.  There are ``ceil(units / chunk)`` chunks,
            equal within one unit.
        group: consecutive units that are dealt to chunks together, 1 to ``chunk``; 1 is the exact division of the
            paper.
            Default: one 32-byte sector of ``grad`` (8 for float32), or ``chunk`` if that is smaller.
        max_rows: at most so many rows enter the second moment, every ``ceil(rows / max_rows)``-th after a random
            offset.
        permutation: int64, (units,), or (units + 1,) with ``bias_grad``: deals these units in this order instead of
            drawing a division.
        seed, step: decide the division and the offset of the rows; the layer counts as position 0 of
            :func:`foreach_precondition_`.
        bias_grad: (out,); the bias is one more unit, with input 1, and the last index.  With several taps each
            corrects a copy, and the copies are averaged.

    Returns:
        The corrected gradient with the shape, dtype and layout of ``grad``; with ``bias_grad`` ``(grad, bias_grad)``.

        It never raises for the values of its data and never writes a NaN that was not in ``grad``: a chunk whose
        factorisation fails is tried again with 10 and 100 times the damping and then left as it was (so are all chunks
        that saw NaN or Inf, or rows so large that their squares overflow, beyond about 1e19 in float32), and so is
        every row of a chunk whose result would not be finite.  No rows: the gradient is returned as it is.

    Raises:
        ValueError: a shape, ``chunk``, ``group``, ``damping``, ``scaling``, ``max_rows`` or ``permutation`` out of
        range. TypeError, NotImplementedError: dtypes that are not floating point; complex, sparse or distributed
        tensors. RuntimeError: tensors on several devices.
    """
    return _precondition(
        "precondition", grad, inputs, damping, scaling, chunk, group, max_rows, permutation, seed, step, bias_grad
    )[0]


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


# The stages, for running averages, reuse of an inverse over several steps, and sums over ranks


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
    _check_entries(op, len(inputs), layers, grads=grads, bias=bias, permutation=permutation, row_counts=row_counts)
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
    orders, order_layers = _dense(permutation)
    counts, count_layers = _dense(row_counts)
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
            _signed(seed),
            _signed(step),
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
    _check_entries(op, len(covariances), None, units=units)
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
    _check_entries(op, len(grads), layers, inverses=inverses, bias_grads=bias_grads, permutation=permutation)
    if not grads:
        return
    for tensor in (*grads, *inverses):
        check_tensor(op, "grads and inverses", tensor)
    biases, bias_layers = _dense(bias_grads)
    check_device(op, [*grads, *biases, *inverses, info])
    orders, order_layers = _dense(permutation)
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
            _signed(seed),
            _signed(step),
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
    _check_entries(op, len(grads), layers, covariances=covariances, bias_grads=bias_grads, permutation=permutation)
    if not grads:
        empty = torch.empty(0, dtype=torch.int32)
        return empty, empty.float()
    for tensor in (*grads, *covariances):
        check_tensor(op, "grads and covariances", tensor)
    biases, bias_layers = _dense(bias_grads)
    check_device(op, [*grads, *biases, *covariances])
    orders, order_layers = _dense(permutation)
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
            _signed(seed),
            _signed(step),
        )


# Shapes for tracing


def _chunks(units: int, chunk: int) -> int:
    return -(-units // chunk)


@torch.library.register_fake("consistency_ops::foreach_precondition_")
def _(
    grads,
    bias_grads,
    inputs,
    permutations,
    row_counts,
    bias_layers,
    permutation_layers,
    row_count_layers,
    layers,
    groups,
    damping,
    trace_scaling,
    chunk,
    max_rows,
    seed,
    step,
    tf32=False,
    rung=0,
    ctas=0,
):
    total = 0
    for i, (grad, x) in enumerate(zip(grads, inputs, strict=True)):
        conv_groups = x.shape[1] // grad.shape[1] if grad.dim() > 2 else 1
        total = total + conv_groups * _chunks(grad.shape[1] + int(i in bias_layers), chunk)
    return grads[0].new_empty(total, dtype=torch.int32), grads[0].new_empty(total, dtype=torch.float32)


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
        x.new_empty(x.shape[dim] // u * _chunks(u + int(b), chunk), chunk, chunk, dtype=dtype)
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
