"""The functional API: the correction of arXiv 1708.00631 for one layer, for all layers, and stage by stage.

Checks that a user can trip are Python exceptions (``checks.py``); the compiled operators
(``torch.ops.consistency_ops``) check what memory safety needs, and compute.  The functions of the correction are not
differentiable: they work on gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import Scaling, check_entries, count_chunks, default_group, dense, signed
from .checks import (
    check_device,
    check_integers,
    check_layer,
    check_list,
    check_options,
    check_overlap,
    check_permutation,
    check_row_counts,
    is_real,
)

_operator = torch.ops.consistency_ops.foreach_precondition_.default


def launch_correction(
    grads: list[Tensor],
    inputs: list[Tensor],
    *,
    bias_grads: list[Tensor],
    bias_layers: list[int],
    permutations: list[Tensor],
    permutation_layers: list[int],
    row_counts: list[Tensor],
    row_count_layers: list[int],
    layers: list[int],
    damping: float,
    scaling: str,
    chunk: int,
    group: int | None,
    max_rows: int,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Call the compiled operator, the only place that does: correct all ``grads`` in place.

    Nothing is checked here: either the caller has (:func:`foreach_precondition_`), or what it passes is right by
    construction (captured layers), or the operator itself refuses it. No graph is recorded only if the caller has
    switched autograd off. Must be cheap: it runs in every step of a training.

    Args:
        grads, inputs: one each a layer, at least one layer, all on one device; no gradient overlaps an input.
        bias_grads, permutations, row_counts: only those that exist, in the order of the layers; the list of the same
            name with ``_layers`` says to which layer (index in ``grads``) each belongs.
        layers: the number of each layer in the random division.
        damping, scaling, chunk, group, max_rows: as for :func:`precondition`.
        seed, step: in the range of a signed 64-bit integer.

    Returns:
        ``(info, damping_used)`` of all chunks, in the order of the layers.
    """
    return _operator(
        grads,
        bias_grads,
        inputs,
        permutations,
        row_counts,
        bias_layers,
        permutation_layers,
        row_count_layers,
        layers,
        [default_group(grad.dtype, chunk) if group is None else group for grad in grads],
        damping,
        scaling == "trace",
        chunk,
        max_rows,
        seed,
        step,
        # TF32, for products of float32 on CUDA; the CPU always computes in float32.
        grads[0].is_cuda and torch.get_float32_matmul_precision() != "highest",
    )


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
    check_entries(
        op, len(grads), layers, inputs=inputs, bias_grads=bias_grads, permutation=permutations, row_counts=row_counts
    )
    if not grads:
        empty = torch.empty(0, dtype=torch.int32)
        return (empty, empty.float()) if return_damping else empty
    for i, grad in enumerate(grads):
        check_layer(op, grad, inputs[i], bias_grads[i] if bias_grads is not None else None)
    biases, bias_layers = dense(bias_grads)
    counts, count_layers = dense(row_counts)
    check_row_counts(op, counts)
    check_device(op, [*grads, *inputs, *biases, *counts])
    if permutations is not None:
        has_bias = set(bias_layers)
        permutations = [
            None if p is None else check_permutation(op, p, grads[i].shape[1] + (i in has_bias))
            for i, p in enumerate(permutations)
        ]
    orders, order_layers = dense(permutations)
    if is_real(grads[0]):
        inputs = check_overlap(op, [*grads, *biases], inputs)
    with torch.no_grad():
        info, used = launch_correction(
            grads,
            inputs,
            bias_grads=biases,
            bias_layers=bias_layers,
            permutations=orders,
            permutation_layers=order_layers,
            row_counts=counts,
            row_count_layers=count_layers,
            layers=list(range(len(grads))) if layers is None else list(layers),
            damping=float(damping),
            scaling=scaling,
            chunk=chunk,
            group=group,
            max_rows=max_rows,
            seed=signed(seed),
            step=signed(step),
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


# Shapes for tracing


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
        total = total + conv_groups * count_chunks(grad.shape[1] + int(i in bias_layers), chunk)
    return grads[0].new_empty(total, dtype=torch.int32), grads[0].new_empty(total, dtype=torch.float32)
