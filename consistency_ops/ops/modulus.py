"""The modulus activation: the absolute value, with one bit an element kept for backward.

In eager mode a real ``x`` takes one of two ways. Where ``csrc/torch_abi`` was built for the torch that runs, its C++
node of autograd does the plain case: a tensor that needs a gradient, outside every transform and mode. Everything else,
and everything without that node, is the Python function :class:`_Modulus`. Its derivative negates elements
(:func:`_flip`), which is linear in the gradient and so its own derivative; ``torch.func`` and forward-mode AD know
both. A complex ``x`` has one way, :class:`_ComplexModulus`.

``torch.compile`` and ``torch.export`` trace operators, not autograd functions: for them each of the four operators has
a shape and a formula of its derivative, registered at the end of this file. Those formulas know no ``torch.func``
transforms; inside a compiled transform, and for complex CUDA tensors, `reference.modulus` takes their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .. import reference
from .._ops import ops
from . import library
from .checks import type_name
from .registration import register_autograd, register_fake

_REAL = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_COMPLEX = frozenset({torch.complex64, torch.complex128})

_modulus: Callable[[Tensor], Tensor] = ops.modulus.default
_forward: Callable[..., tuple[Tensor, Tensor]] = ops.modulus_forward.default
_backward: Callable[..., Tensor] = ops.modulus_backward.default
_complex_backward: Callable[[Tensor, Tensor], Tensor] = ops.modulus_complex_backward.default
_transforming = torch._C._are_functorch_transforms_active
# Around every eager call: past the registered formulas, which are Python and cost more than a small tensor.
_below_autograd = torch._C._AutoDispatchBelowAutograd
# |x| for a plain real tensor that needs a gradient, outside every transform and mode; else None.
_node: Callable[[Tensor], Tensor | None] | None = None if library.torch_abi is None else library.torch_abi.modulus


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
        raise TypeError(f"modulus: x must be a Tensor, got {type_name(x)}")
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
        return _complex_modulus(x) if is_complex else _modulus_and_signs(x, 0, None)[0]
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return _forward(x)[0] if needs_grad and not is_complex else _modulus(x)
    if needs_grad:
        return _complex_modulus(x) if is_complex else _apply_untransformed(x, 0, [])
    with _below_autograd():
        return _modulus(x)


class _Modulus(Function):
    """The modulus of a real ``x``; each element of the first ``batch_dims`` dimensions has sign bits of its own.

    The result is ``y``, and the node has one output; the signs reach ``setup_context`` through the empty list
    ``signs_of``. A transform must see every tensor that is saved: with None the result is ``(y, signs)``.
    """

    @staticmethod
    def forward(x: Tensor, batch_dims: int, signs_of: list[Tensor] | None) -> Tensor | tuple[Tensor, Tensor]:
        with _below_autograd():
            y, signs = _forward(x, batch_dims)
        if signs_of is None:
            return y, signs
        signs_of.append(signs)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        signs_of = inputs[2]
        if signs_of is None:
            y, signs = output
            ctx.mark_non_differentiable(signs)
        else:
            y, signs = output, signs_of.pop()
        ctx.set_materialize_grads(False)  # no zeros for the signs
        ctx.save_for_backward(signs)
        ctx.save_for_forward(signs)
        ctx.strides = y.stride()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        return None if grad is None else _flip(grad, ctx.saved_tensors[0], ctx.strides), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        return _flip(tangent, ctx.saved_tensors[0], ctx.strides), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, batch_dims: int, _: None
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _modulus_and_signs(x.movedim(in_dims[0], 0), batch_dims + 1, None), (0, 0)


_modulus_and_signs: Callable[[Tensor, int, None], tuple[Tensor, Tensor]] = _Modulus.apply


# Without the Python wrapper of apply, which looks for transforms and takes as long as all the rest of a small call.
_apply_untransformed: Callable[[Tensor, int, list[Tensor]], Tensor] = super(Function, _Modulus).apply


def _flip(grad: Tensor, signs: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return ``grad``, negated where ``signs`` has a bit, with ``strides``; the C++ node calls it, too."""
    if torch.compiler.is_compiling():  # compiled autograd of an eager forward
        return _backward(grad, signs, strides)
    if torch.is_grad_enabled() or _transforming() or forward_ad._current_level >= 0:
        flipped: Tensor = _Flip.apply(grad, signs, strides)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return flipped
    return _flip_now(grad, signs, strides)


def _flip_now(grad: Tensor, signs: Tensor, strides: tuple[int, ...]) -> Tensor:
    with _below_autograd():
        return _backward(grad, signs, None if grad.stride() == strides else strides)


class _Flip(Function):
    """:func:`_flip` where somebody differentiates it."""

    @staticmethod
    def forward(grad: Tensor, signs: Tensor, strides: tuple[int, ...]) -> Tensor:
        return _flip_now(grad, signs, strides)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])
        ctx.strides = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _flip(grad, ctx.saved_tensors[0], ctx.strides), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _flip(tangent, ctx.saved_tensors[0], ctx.strides)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], grad: Tensor, signs: Tensor, strides: tuple[int, ...]
    ) -> tuple[Tensor, int]:
        def batched(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        grad, signs = batched(grad, in_dims[0]), batched(signs, in_dims[1]).contiguous()
        return _flip(grad, signs, (grad[0].numel(), *strides)), 0


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
