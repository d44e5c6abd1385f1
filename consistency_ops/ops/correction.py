"""The correction of gradients (arXiv 1708.00631) for one layer and for all layers of a network in one call.

Mistakes of a caller raise Python exceptions before anything is computed (``checks.py``). The compiled operator
(``foreach_precondition_`` of ``_ops.py``) checks only what memory safety needs. The functions are not
differentiable: they work on gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, TypeVar, overload

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # comes with torch; typing's own is generic from Python 3.11 on

from .arguments import Options, Scaling, check_entries, count_chunks, default_group, dense, layer_numbers, signed
from .backend import call
from .checks import (
    check_device,
    check_layer,
    check_list,
    check_overlap,
    check_permutation,
    check_row_counts,
    check_widths,
    is_real,
)
from .registration import register_fake

Corrected = TypeVar("Corrected", Tensor, tuple[Tensor, Tensor])


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
        damping, scaling, group, max_rows: as for :func:`precondition`.
        chunk: as there, but 0 instead of ``None``.
        seed, step: in the range of a signed 64-bit integer.

    Returns:
        ``(info, damping_used)`` of all chunks, in the order of the layers.
    """
    groups = {dtype: default_group(dtype, chunk) if group is None else group for dtype in {g.dtype for g in grads}}
    results: tuple[Tensor, Tensor] = call(
        "foreach_precondition_",
        chunk,
        [*grads, *inputs],
        grads,
        bias_grads,
        inputs,
        permutations,
        row_counts,
        bias_layers,
        permutation_layers,
        row_count_layers,
        layers,
        [groups[grad.dtype] for grad in grads],
        damping,
        scaling == "trace",
        chunk,
        max_rows,
        seed,
        step,
        # TF32, for products of float32 on CUDA; the CPU always computes in float32.
        grads[0].is_cuda and torch.get_float32_matmul_precision() != "highest",
    )
    return results


@overload
def foreach_precondition_(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    bias_grads: Sequence[Tensor | None] | None = ...,
    damping: float = ...,
    scaling: Scaling = ...,
    chunk: int | None = ...,
    group: int | None = ...,
    max_rows: int = ...,
    permutation: Sequence[Tensor | None] | None = ...,
    seed: int = ...,
    step: int = ...,
    layers: Sequence[int] | None = ...,
    row_counts: Sequence[Tensor | None] | None = ...,
    return_damping: Literal[False] = ...,
) -> Tensor: ...
@overload
def foreach_precondition_(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    bias_grads: Sequence[Tensor | None] | None = ...,
    damping: float = ...,
    scaling: Scaling = ...,
    chunk: int | None = ...,
    group: int | None = ...,
    max_rows: int = ...,
    permutation: Sequence[Tensor | None] | None = ...,
    seed: int = ...,
    step: int = ...,
    layers: Sequence[int] | None = ...,
    row_counts: Sequence[Tensor | None] | None = ...,
    return_damping: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def foreach_precondition_(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    bias_grads: Sequence[Tensor | None] | None = None,
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int | None = 128,
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

    The arguments are those of :func:`precondition`, except that ``grads``, ``inputs``, ``bias_grads``, ``permutation``,
    ``layers`` and ``row_counts`` are lists with one entry for each layer. An entry of ``bias_grads``, ``permutation``
    or ``row_counts`` may be ``None``: that layer has no bias, draws its division, uses all its rows.

    Args:
        layers: an integer for each layer; ``(seed, step, integer)`` fixes the random division of its units. Default:
            the position in the list. Consecutive layers that get the *same tensor* as input and the same integer (and
            equal ``group``, ``permutation`` and ``row_counts``, and both or neither a bias) are factored once and share
            the inverse: use it for query, key and value. Grouped convolutions never share. The results are those of
            separate inputs, up to rounding on CUDA; a layer without outputs gets the ``info`` of the first of them.
        row_counts: one-element int64 tensors, on the device of the inputs; only so many leading rows of that layer's
            input are used.
        return_damping: also return the damping used.

    Returns:
        ``info``, an int32 tensor with one entry for each chunk, in the order of the layers and of the groups of a
        convolution. 0: the chunk was corrected. Otherwise the order of the leading minor that was not positive definite
        when the chunk was given up and its gradient left unchanged. With ``return_damping``: the pair ``(info,
        damping_used)``, the second as in :func:`precondition_ex`.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: wrong shapes, ranges, dtypes or devices, or gradients
            that overlap. Nothing has been changed then.
    """
    options = Options("foreach_precondition_", damping, scaling, chunk, group, max_rows, seed, step)
    info, used = _correct_layers(options, grads, inputs, bias_grads, permutation, layers, row_counts)
    return (info, used) if return_damping else info


def _correct_layers(
    options: Options,
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    bias_grads: Sequence[Tensor | None] | None,
    permutations: Sequence[Tensor | None] | None,
    layers: Sequence[int] | None = None,
    row_counts: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Check everything but the options, which have checked themselves, then correct in place."""
    op = options.op
    grads, inputs = check_list(op, "grads", grads), check_list(op, "inputs", inputs)
    check_entries(
        op, len(grads), layers, inputs=inputs, bias_grads=bias_grads, permutation=permutations, row_counts=row_counts
    )
    if not grads:
        empty = torch.empty(0, dtype=torch.int32)
        return empty, empty.float()
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
    check_widths(op, options.chunk, (grad.shape[1] + (i in set(bias_layers)) for i, grad in enumerate(grads)))
    if is_real(grads[0]):
        inputs = check_overlap(op, [*grads, *biases], inputs)
    with torch.no_grad():
        return launch_correction(
            grads,
            inputs,
            bias_grads=biases,
            bias_layers=bias_layers,
            permutations=orders,
            permutation_layers=order_layers,
            row_counts=counts,
            row_count_layers=count_layers,
            layers=layer_numbers(layers, len(grads)),
            damping=float(options.damping),
            scaling=options.scaling,
            chunk=options.chunk or 0,
            group=options.group,
            max_rows=options.max_rows,
            seed=signed(options.seed),
            step=signed(options.step),
        )


class PreconditionResult(NamedTuple, Generic[Corrected]):
    """What :func:`precondition_ex` returns.

    Attributes:
        corrected: the corrected gradient; with ``bias_grad`` the pair of the corrected gradient and the corrected
            gradient of the bias.
        info: int32, (chunks,). 0: the chunk was corrected. Otherwise the chunk was given up and is unchanged, and the
            number is the order of the leading minor of the damped chunk that is not positive definite, as in
            ``torch.linalg.cholesky_ex``.
        damping_used: float32, (chunks,): ``damping``, or 10 or 100 times that where the factorisation had failed.
    """

    corrected: Corrected
    info: Tensor
    damping_used: Tensor


@overload
def precondition_ex(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = ...,
    scaling: Scaling = ...,
    chunk: int | None = ...,
    group: int | None = ...,
    max_rows: int = ...,
    permutation: Tensor | None = ...,
    seed: int = ...,
    step: int = ...,
    bias_grad: None = ...,
) -> PreconditionResult[Tensor]: ...
@overload
def precondition_ex(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = ...,
    scaling: Scaling = ...,
    chunk: int | None = ...,
    group: int | None = ...,
    max_rows: int = ...,
    permutation: Tensor | None = ...,
    seed: int = ...,
    step: int = ...,
    bias_grad: Tensor,
) -> PreconditionResult[tuple[Tensor, Tensor]]: ...
def precondition_ex(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int | None = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    bias_grad: Tensor | None = None,
) -> PreconditionResult[Tensor] | PreconditionResult[tuple[Tensor, Tensor]]:
    """Correct the gradient of one layer as :func:`precondition` does, and say what became of every chunk.

    The arguments, and the errors raised, are those of :func:`precondition`.

    Returns:
        A named tuple ``(corrected, info, damping_used)``, a :class:`PreconditionResult`. ``corrected`` is what
        :func:`precondition` returns; ``info`` (int32) and ``damping_used`` (float32) have one entry for each chunk.
    """
    options = Options("precondition_ex", damping, scaling, chunk, group, max_rows, seed, step)
    corrected, bias, info, used = _correct_copy(options, grad, inputs, permutation, bias_grad)
    if bias is None:
        return PreconditionResult(corrected, info, used)
    return PreconditionResult((corrected, bias), info, used)


@overload
def precondition(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = ...,
    scaling: Scaling = ...,
    chunk: int | None = ...,
    group: int | None = ...,
    max_rows: int = ...,
    permutation: Tensor | None = ...,
    seed: int = ...,
    step: int = ...,
    bias_grad: None = ...,
) -> Tensor: ...
@overload
def precondition(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = ...,
    scaling: Scaling = ...,
    chunk: int | None = ...,
    group: int | None = ...,
    max_rows: int = ...,
    permutation: Tensor | None = ...,
    seed: int = ...,
    step: int = ...,
    bias_grad: Tensor,
) -> tuple[Tensor, Tensor]: ...
def precondition(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int | None = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    bias_grad: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Correct the gradient of one layer: return ``G[:, c] (X_c^T X_c / n + damping I)^-1`` for every chunk c of units.

    These are the normal equations of the layer's local linear model (arXiv 1708.00631): the gradient is multiplied from
    the right by the inverse of the damped second moment of the layer's input. The second moment is taken over a uniform
    subsample of the rows, and the units are divided into chunks at random.

    Args:
        grad: gradient of the weight, ``(out, in)``, or ``(out, in / groups, *kernel)`` of a convolution with up to
            three kernel dimensions. float32, float64, bfloat16 or float16, any strides.
        inputs: what the layer saw, ``(..., in)``; for a convolution ``(N, in, *spatial)`` in any memory format, or
            ``(rows, in)``. Every leading or spatial position is a row. The units of a convolution are its input
            channels, and every kernel tap of every output channel is a row of ``grad``. The dtype may differ from that
            of ``grad``. Sums are float32, or float64 if either is float64.
        damping: the number that is added to the diagonal, at least 0.
        scaling: ``"absolute"``: ``A + damping I`` (the paper). ``"trace"``: ``A / tau + damping I`` with
            ``tau = trace(A) / units`` of the layer (of each group of a convolution), which keeps the corrected gradient
            on the scale of the gradient.
        chunk: the largest number of units that are inverted together, 1 to 16 384; ``None``: all units of the layer.
            There are ``ceil(units / chunk)`` chunks, whose sizes differ by at most one unit. Above 256 units a chunk
            is inverted by ``torch.linalg`` instead of the kernels: it takes ``12 units^2`` bytes and
            ``units^3`` operations.
        group: the number of consecutive units that are dealt to chunks together, 1 to ``chunk``. 1 is the exact
            division of the paper. Default: as many units as fill 32 bytes in the dtype of ``grad`` (8 for float32), or
            ``chunk`` if that is smaller.
        max_rows: at most so many rows enter the second moment: of every block of ``ceil(rows / max_rows)`` rows one,
            drawn at random.
        permutation: int64, ``(units,)``, or ``(units + 1,)`` with ``bias_grad``. The units are dealt to chunks in this
            order, instead of a random one.
        seed, step: they decide the random division and which rows are drawn. The layer counts as position 0 of
            :func:`foreach_precondition_`.
        bias_grad: gradient of the bias, ``(out,)``. The bias is one more unit, whose input is 1 and whose index is the
            last. With several kernel taps each corrects a copy of it, and the copies are averaged.

    Returns:
        The corrected gradient with the shape, dtype and layout of ``grad``. With ``bias_grad`` the pair of the
        corrected gradient and the corrected gradient of the bias.

        The function never raises for the values of its data, and never writes a NaN that was not in ``grad``. A chunk
        whose factorisation fails is tried again with 10 and with 100 times the damping, and then left as it was. So is
        a chunk that saw NaN or Inf, or rows so large that their squares overflow (beyond about 1e19 in float32), and so
        is every row of a chunk whose result would not be finite. Without rows the gradient is returned as it is.

    Raises:
        ValueError: a shape does not fit, or ``chunk``, ``group``, ``damping``, ``scaling``, ``max_rows`` or
            ``permutation`` is out of range.
        TypeError, NotImplementedError: a dtype is not floating point; a tensor is complex, sparse or distributed.
        RuntimeError: the tensors are on several devices.
    """
    options = Options("precondition", damping, scaling, chunk, group, max_rows, seed, step)
    corrected, bias, _, _ = _correct_copy(options, grad, inputs, permutation, bias_grad)
    return corrected if bias is None else (corrected, bias)


def _correct_copy(
    options: Options, grad: Tensor, inputs: Tensor, permutation: Tensor | None, bias_grad: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The corrected gradient, that of the bias, ``info`` and the damping used; nothing is changed in place."""
    check_layer(options.op, grad, inputs, bias_grad)  # before the copies, which need tensors
    corrected = grad.detach().clone()
    bias = None if bias_grad is None else bias_grad.detach().clone()
    info, used = _correct_layers(
        options,
        [corrected],
        [inputs],
        None if bias is None else [bias],
        None if permutation is None else [permutation],
    )
    return corrected, bias, info, used


@register_fake("foreach_precondition_")
def _(
    grads: list[Tensor],
    bias_grads: list[Tensor],
    inputs: list[Tensor],
    permutations: list[Tensor],
    row_counts: list[Tensor],
    bias_layers: list[int],
    permutation_layers: list[int],
    row_count_layers: list[int],
    layers: list[int],
    groups: list[int],
    damping: float,
    trace_scaling: bool,
    chunk: int,
    max_rows: int,
    seed: int,
    step: int,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    total = 0
    for i, (grad, x) in enumerate(zip(grads, inputs, strict=True)):
        conv_groups = x.shape[1] // grad.shape[1] if grad.dim() > 2 else 1
        total = total + conv_groups * count_chunks(grad.shape[1] + int(i in bias_layers), chunk)
    return grads[0].new_empty(total, dtype=torch.int32), grads[0].new_empty(total, dtype=torch.float32)
