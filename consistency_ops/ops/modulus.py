"""The modulus activation: the absolute value, with one bit an element kept for backward.

The derivative is written twice: as autograd functions for eager mode, which every transform of ``torch.func`` and
forward-mode AD understand, and as formulas registered on the operators, which ``torch.compile`` and ``torch.export``
use.

Where ``csrc/autograd`` was built for the torch that runs, a node in C++ does the plain real case of the first, in a
third less time for small tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .. import reference
from . import library
from .registration import register_autograd, register_fake

_REAL = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_COMPLEX = frozenset({torch.complex64, torch.complex128})

_modulus: Callable[[Tensor], Tensor] = torch.ops.consistency_ops.modulus.default
_forward: Callable[..., tuple[Tensor, Tensor]] = torch.ops.consistency_ops.modulus_forward.default
_backward: Callable[..., Tensor] = torch.ops.consistency_ops.modulus_backward.default
_complex_backward: Callable[[Tensor, Tensor], Tensor] = torch.ops.consistency_ops.modulus_complex_backward.default
_transforming = torch._C._are_functorch_transforms_active
# Around every eager call: past the registered formulas, which are Python and cost more than a small tensor.
_below_autograd = torch._C._AutoDispatchBelowAutograd
# |x| for a plain real tensor that needs a gradient, outside every transform and mode; else None.
_node: Callable[[Tensor], Tensor | None] | None = None if library.autograd is None else library.autograd.modulus


def modulus(x: Tensor) -> Tensor:
    """Return the absolute value of every element: the modulus activation, which preserves norms (arXiv 1708.00631).

    The real derivative is -1 below zero and +1 at and above zero, also at -0.0 and NaN, so that the differential is
    orthogonal everywhere. One bit an element is kept for it, and nothing if no gradient is needed. The complex
    derivative is ``x / abs(x)``, and 0 at 0; ``x`` is kept for it.

    Args:
        x: any shape and strides; float32, float64, bfloat16, float16, complex64 or complex128.

    Returns:
        A real tensor in the memory format of ``x``. Complex magnitudes neither overflow nor underflow on the way, as
        with C99's ``hypot``.

    Raises:
        TypeError: another dtype, or no tensor.
        NotImplementedError: a sparse or nested tensor.
    """
    if _node is not None and not torch.compiler.is_compiling():
        y = _node(x)
        if y is not None:
            return y
    if not isinstance(x, Tensor):
        raise TypeError(f"modulus: x must be a Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise NotImplementedError(f"modulus: x must be a dense tensor, got layout {x.layout}")
    is_complex = x.dtype in _COMPLEX
    if not is_complex and x.dtype not in _REAL:
        raise TypeError(f"modulus: x must be floating point or complex, got {x.dtype}")
    if is_complex and x.is_cuda:
        return reference.modulus(x)  # complex tensors have no CUDA kernel
    if _transforming() or forward_ad._current_level >= 0:
        if torch.compiler.is_compiling():
            return reference.modulus(x)  # registered formulas know no transforms
        return _complex_modulus(x) if is_complex else _modulus_and_signs(x, 0)[0]
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return _forward(x)[0] if needs_grad and not is_complex else _modulus(x)
    if needs_grad:
        return _complex_modulus(x) if is_complex else _apply_fast(x)
    with _below_autograd():
        return _modulus(x)


def _strides_if_other(grad: Tensor, strides: tuple[int, ...]) -> tuple[int, ...] | None:
    return None if grad.stride() == strides else strides


class _Modulus(Function):
    """(|x|, signs) for real ``x``; each element of the first ``batch_dims`` dimensions has bits of its own."""

    @staticmethod
    def forward(x: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            return _forward(x, batch_dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, signs = output
        ctx.mark_non_differentiable(signs)
        ctx.save_for_backward(signs)
        ctx.save_for_forward(signs)
        ctx.strides = y.stride()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
        return _flip(grad, *ctx.saved_tensors, ctx.strides), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, None]:
        return _flip(tangent, *ctx.saved_tensors, ctx.strides), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, batch_dims: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _modulus_and_signs(x.movedim(in_dims[0], 0), batch_dims + 1), (0, 0)


_modulus_and_signs: Callable[[Tensor, int], tuple[Tensor, Tensor]] = _Modulus.apply


class _Flip(Function):
    """``grad``, negated where ``signs`` has a bit; the result has ``strides``.  Linear in ``grad``."""

    @staticmethod
    def forward(grad: Tensor, signs: Tensor, strides: tuple[int, ...]) -> Tensor:
        with _below_autograd():
            return _backward(grad, signs, _strides_if_other(grad, strides))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])
        ctx.strides = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _flip(grad, *ctx.saved_tensors, ctx.strides), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _flip(tangent, *ctx.saved_tensors, ctx.strides)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], grad: Tensor, signs: Tensor, strides: tuple[int, ...]
    ) -> tuple[Tensor, int]:
        def batched(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        grad, signs = batched(grad, in_dims[0]), batched(signs, in_dims[1]).contiguous()
        return _flip(grad, signs, (grad[0].numel(), *strides)), 0


_flip: Callable[..., Tensor] = _Flip.apply


class _FastModulus(Function):
    """The same without transforms: the call and its backward cost less, which decides for small tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with _below_autograd():
            y, signs = _forward(x)
        ctx.save_for_backward(signs)
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (signs,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return _backward(grad, signs, ctx.strides)
        if torch.is_grad_enabled() or _transforming() or forward_ad._current_level >= 0:
            return _flip(grad, signs, ctx.strides)
        with _below_autograd():
            return _backward(grad, signs, _strides_if_other(grad, ctx.strides))


# Without the Python wrapper of apply, which looks for transforms.
_apply_fast: Callable[[Tensor], Tensor] = super(Function, _FastModulus).apply


class _ComplexModulus(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        with _below_autograd():
            return _modulus(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        if torch.compiler.is_compiling():
            return _complex_backward(grad, x)
        if torch.is_grad_enabled() or _transforming() or forward_ad._current_level >= 0:
            return grad * x.sgn()
        with _below_autograd():
            return _complex_backward(grad, x)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return (x.sgn().conj() * tangent).real

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor) -> tuple[Tensor, int]:
        return _complex_modulus(x), in_dims[0]


_complex_modulus: Callable[[Tensor], Tensor] = _ComplexModulus.apply


# Formulas and shapes for torch.compile and torch.export; eager mode uses the functions above.


@register_fake("modulus")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=x.dtype.to_real())


@register_fake("modulus_forward")
def _(x: Tensor, batch_dims: int = 0) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x) if batch_dims == 0 else x.new_empty(x.shape)
    rest = 1
    for size in x.shape[batch_dims:]:
        rest = rest * size
    return y, x.new_empty((*x.shape[:batch_dims], (rest + 7) // 8), dtype=torch.uint8)


@register_fake("modulus_backward")
def _(grad: Tensor, signs: Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
    return torch.empty_strided(
        grad.shape, grad.stride() if strides is None else strides, dtype=grad.dtype, device=grad.device
    )


@register_fake("modulus_complex_backward")
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _modulus_formula(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return grad * x.sgn() if x.is_complex() else torch.where(x < 0, -grad, grad)


def _save_signs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.strides = output[0].stride()


def _forward_formula(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    return _backward(grad, *ctx.saved_tensors, ctx.strides), None


def _save_for_flip(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.strides = output.stride()


def _backward_formula(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _backward(grad, *ctx.saved_tensors, ctx.strides), None, None


def _save_both(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _complex_backward_formula(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    real_grad, x = ctx.saved_tensors
    direction = x.sgn()
    # d/dx of grad x / |x| is the part of the incoming gradient across x, over |x|.
    inner = (direction.conj() * grad).real
    across = torch.where(x == 0, 0, (grad - direction * inner) * real_grad / x.abs())
    return inner, across


register_autograd("modulus", _modulus_formula, setup_context=_save_input)
register_autograd("modulus_forward", _forward_formula, setup_context=_save_signs)
register_autograd("modulus_backward", _backward_formula, setup_context=_save_for_flip)
register_autograd("modulus_complex_backward", _complex_backward_formula, setup_context=_save_both)
