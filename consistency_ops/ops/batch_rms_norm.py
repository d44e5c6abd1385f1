"""Batch RMS normalisation: scale consistency without means, scales or shifts (arXiv 1708.00631).

There are three operators: one computes the denominators in training and updates the statistics in place, one computes
them in evaluation, one divides. Only the division is differentiable. Its derivative is written twice: as an autograd
function for eager mode, which every transform of ``torch.func`` and forward-mode AD understand, and as plain torch for
``torch.compile``, which fuses it with its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .._ops import ops
from .checks import check_numbers, type_name
from .registration import register_autograd, register_fake, register_vmap

_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_STATISTICS = frozenset({torch.float32, torch.float64})

_training: Callable[..., Tensor] = ops.batch_rms_norm_denominator_.default
_evaluation: Callable[..., Tensor] = ops.batch_rms_norm_denominator.default
_divide: Callable[[Tensor, Tensor], Tensor] = ops.batch_rms_norm_divide.default
_transforming = torch._C._are_functorch_transforms_active
# Around every eager division: past the registered formula, which is Python and costs more than a small tensor.
_below_autograd = torch._C._AutoDispatchBelowAutograd


def batch_rms_norm(
    x: Tensor,
    running_ms: Tensor,
    *,
    training: bool,
    num_batches: Tensor | None = None,
    decay: float = 0.1,
    eps: float = 1e-2,
) -> Tensor:
    """Divide every channel of ``x`` by its root mean square over the batch and the pixels (arXiv 1708.00631).

    With v = ``running_ms`` and rho = ``decay``, the weight of the *old* value::

        v_c <- rho v_c + (1 - rho) mean(x_c^2)                       in training only, in place
        D_c  = sqrt(v_c / (1 - rho^num_batches) + eps * max_k(v_k + 1e-6))
        y    = x / D,    dL/dx = dL/dy / D                           D is a constant in backward

    Evaluation repeats the D of the last training batch. Before the first one v is 0, so that D is ``sqrt(1e-6 eps)`` in
    every channel. An empty batch updates nothing. A NaN or Inf in one channel makes its v, and through the maximum
    every D, not finite, for as long as v remembers it. Sums do not depend on the number of threads.

    Args:
        x: ``(N, C)`` or ``(N, C, *spatial)`` in any memory format; float32, float64, bfloat16 or float16.
        running_ms: ``(C,)``, contiguous, float32 or float64; starts at 0.
        training: whether the statistics are those of this batch, and are updated.
        num_batches: int64, ``(1,)``; starts at 0 and counts the training batches, this one included. ``None``, or a
            count of 0: v is not corrected for its start at 0.
        decay: in [0, 1).
        eps: greater than 0, relative to the most active channel. It limits the gain of the least active channel to
            about ``1 / sqrt(eps)`` times that of the most active. 1e-10 for a layer that normalises data.

    Returns:
        ``y``, with the shape, dtype and memory format of ``x``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, or a number out of range.
        NotImplementedError: a complex, sparse or nested tensor.
        RuntimeError: tensors on several devices, or ``running_ms`` requires a gradient.
    """
    _check(x, running_ms, num_batches, decay, eps)
    if training:
        denominator = _training(x.detach(), running_ms, num_batches, decay, eps)
    else:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        denominator = _evaluation(running_ms, num_batches, dtype, decay, eps)
    if torch.compiler.is_compiling():
        return _plain_division(x, denominator)
    if _transforming() or forward_ad._current_level >= 0:
        return _division(x, denominator)
    if x.requires_grad and torch.is_grad_enabled():
        return _apply_fast(x, denominator)
    with _below_autograd():
        return _divide(x, denominator)


def _check(x: Tensor, running_ms: Tensor, num_batches: Tensor | None, decay: float, eps: float) -> None:
    def fail(error: type[Exception], message: str) -> None:
        raise error(f"batch_rms_norm: {message}")

    for name, tensor in (("x", x), ("running_ms", running_ms), ("num_batches", num_batches)):
        if not isinstance(tensor, Tensor) and not (name == "num_batches" and tensor is None):
            fail(TypeError, f"{name} must be a Tensor, got {type_name(tensor)}")
    if x.dtype not in _FLOATS:
        error = NotImplementedError if x.is_complex() else TypeError
        fail(error, f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.layout is not torch.strided or x.is_nested:
        fail(NotImplementedError, f"x must be a dense tensor, got layout {x.layout}")
    if running_ms.dtype not in _STATISTICS:
        fail(TypeError, f"running_ms must be float32 or float64, got {running_ms.dtype}")
    if x.is_cuda and torch.float64 in (x.dtype, running_ms.dtype):
        fail(NotImplementedError, f"the CUDA kernels compute in float32, got a float64 tensor on {x.device}")
    if x.dim() < 2:
        fail(ValueError, f"x must be (N, C) or (N, C, *spatial), got shape {tuple(x.shape)}")
    if running_ms.dim() != 1 or running_ms.shape[0] != x.shape[1] or not running_ms.is_contiguous():
        fail(
            ValueError,
            f"running_ms must be contiguous of shape ({x.shape[1]},), got shape {tuple(running_ms.shape)} and strides "
            f"{running_ms.stride()}",
        )
    if running_ms.device != x.device:
        fail(RuntimeError, f"running_ms must be on {x.device}, got {running_ms.device}")
    if running_ms.requires_grad:
        fail(RuntimeError, "running_ms must not require a gradient: it is updated in place and D is a constant")
    if num_batches is not None:
        if num_batches.dtype != torch.int64:
            fail(TypeError, f"num_batches must be int64, got {num_batches.dtype}")
        # torch.compile loses in-place updates of 0-dim CPU buffers, so they are refused everywhere.
        if num_batches.shape != (1,):
            fail(ValueError, f"num_batches must have shape (1,), got {tuple(num_batches.shape)}")
        if num_batches.device != x.device:
            fail(RuntimeError, f"num_batches must be on {x.device}, got {num_batches.device}")
    check_numbers("batch_rms_norm", decay=decay, eps=eps)
    if not 0 <= decay < 1:
        fail(ValueError, f"decay must be in [0, 1), got {decay}")
    if not 0 < eps < float("inf"):
        fail(ValueError, f"eps must be positive and finite, got {eps}")


def _plain_division(x: Tensor, denominator: Tensor) -> Tensor:
    return (x / denominator.view(-1, *[1] * (x.dim() - 2))).to(x.dtype)


class _Division(Function):
    """x / D with D a constant.  Linear in ``x``."""

    @staticmethod
    def forward(x: Tensor, denominator: Tensor) -> Tensor:
        with _below_autograd():
            return _divide(x, denominator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (denominator,) = ctx.saved_tensors  # in a checkpoint this recomputes the forward pass, with autograd
        if torch.compiler.is_compiling():
            return _plain_division(grad, denominator), None
        if torch.is_grad_enabled() or _transforming() or forward_ad._current_level >= 0:
            return _division(grad, denominator), None
        with _below_autograd():
            return _divide(grad, denominator), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _division(tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, denominator: Tensor) -> tuple[Tensor, int]:
        x_dim, d_dim = in_dims
        if d_dim is None:  # one more dimension of pixels
            return _division(x.movedim(x_dim, -1), denominator), -1
        # As many times the channels.
        x = x.unsqueeze(1).expand(-1, info.batch_size, *x.shape[1:]) if x_dim is None else x.movedim(x_dim, 1)
        y = _division(x.flatten(1, 2), denominator.movedim(d_dim, 0).flatten())
        return y.reshape(len(y), *x.shape[1:3], *y.shape[2:]), 1


_division: Callable[[Tensor, Tensor], Tensor] = _Division.apply
# Without the Python wrapper of apply, which looks for transforms.
_apply_fast: Callable[[Tensor, Tensor], Tensor] = super(Function, _Division).apply


# What the compiler and torch.func need to know of the operators.


@register_fake("batch_rms_norm_denominator_")
def _(x: Tensor, running_ms: Tensor, num_batches: Tensor | None, decay: float, eps: float) -> Tensor:
    return running_ms.new_empty(running_ms.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@register_fake("batch_rms_norm_denominator")
def _(running_ms: Tensor, num_batches: Tensor | None, dtype: torch.dtype, decay: float, eps: float) -> Tensor:
    return running_ms.new_empty(running_ms.shape, dtype=dtype)


@register_fake("batch_rms_norm_divide")
def _(x: Tensor, denominator: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_denominator(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _division_formula(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _divide(grad, *ctx.saved_tensors), None


register_autograd("batch_rms_norm_divide", _division_formula, setup_context=_save_denominator)


def _samples(info: Any, in_dims: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> Iterator[list[Any]]:
    """Yield for each element of the batch its part of every tensor; None stays None."""
    for i in range(info.batch_size):
        yield [t if t is None or dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=False)]


@register_vmap("batch_rms_norm_denominator_")
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    running_ms: Tensor,
    num_batches: Tensor | None,
    decay: float,
    eps: float,
) -> tuple[Tensor, int]:
    if in_dims[1] is None or (num_batches is not None and in_dims[2] is None):
        raise RuntimeError(
            "batch_rms_norm: under vmap, training updates running_ms and num_batches in place, so they must be batched "
            "too; pass training=False, or batched statistics"
        )
    results = []
    for sample, statistics, count in _samples(info, in_dims, (x, running_ms, num_batches)):
        updated = statistics.contiguous()
        results.append(_training(sample, updated, count, decay, eps))
        if updated is not statistics:
            statistics.copy_(updated)
    return torch.stack(results), 0


@register_vmap("batch_rms_norm_denominator")
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    running_ms: Tensor,
    num_batches: Tensor | None,
    dtype: torch.dtype,
    decay: float,
    eps: float,
) -> tuple[Tensor, int]:
    return torch.stack(
        [
            _evaluation(statistics.contiguous(), count, dtype, decay, eps)
            for statistics, count in _samples(info, in_dims, (running_ms, num_batches))
        ]
    ), 0
