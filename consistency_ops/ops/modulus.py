"""The modulus activation: |x|, with one bit an element kept for backward.

The derivative has two homes: autograd functions in eager mode, which every transform of ``torch.func`` and forward-mode
AD understand, and formulas registered on the operators, which ``torch.compile`` and ``torch.export`` use.

Where ``csrc/autograd`` was built for the torch that runs, a node in C++ does the plain real case of the first, with a
third less time for small tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .. import reference
from . import library

_REAL = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_COMPLEX = frozenset({torch.complex64, torch.complex128})

_modulus = torch.ops.consistency_ops.modulus.default
_forward = torch.ops.consistency_ops.modulus_forward.default
_backward = torch.ops.consistency_ops.modulus_backward.default
_complex_backward = torch.ops.consistency_ops.modulus_complex_backward.default
_transforming = torch._C._are_functorch_transforms_active
# Around every eager call: past the registered formulas, which are Python and cost more than a small tensor.
_below_autograd = torch._C._AutoDispatchBelowAutograd
# |x| for a plain real tensor that needs a gradient, outside every transform and mode; else None.
_node = None if library.autograd is None else library.autograd.modulus


def modulus(x: Tensor) -> Tensor:
    """Absolute value of every element, a norm-preserving activation (MoDU; arXiv 1708.00631).

    ``x``: any shape and strides; float32, float64, bfloat16, float16, complex64 or complex128.  The result is real and
    has the memory format of ``x``.  Complex magnitudes neither overflow nor underflow on the way, as with C99's
    ``hypot``.

    The real derivative is -1 below zero and +1 at and above zero (also at -0.0 and NaN), so that the differential is
    orthogonal everywhere; one bit an element is kept for it, and nothing if no gradient is needed.  The complex
    derivative is ``x / |x|``, and 0 at 0; ``x`` is kept.

    Raises TypeError for other dtypes, NotImplementedError for sparse and nested tensors.
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
        return _ComplexModulus.apply(x) if is_complex else _Modulus.apply(x, 0)[0]
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return _forward(x)[0] if needs_grad and not is_complex else _modulus(x)
    if needs_grad:
        return _ComplexModulus.apply(x) if is_complex else _apply_fast(x)
    with _below_autograd():
        return _modulus(x)


def _strides_if_other(grad: Tensor, strides: tuple[int, ...]) -> tuple[int, ...] | None:
    return None if grad.stride() == strides else strides


class _Modulus(Function):
    """(|x|, signs) for real ``x``; each element of the first ``batch_dims`` dimensions has bits of its own."""

    @staticmethod
    def forward(x, batch_dims):
        with _below_autograd():
            return _forward(x, batch_dims)

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, signs = output
        ctx.mark_non_differentiable(signs)
        ctx.save_for_backward(signs)
        ctx.save_for_forward(signs)
        ctx.strides = y.stride()

    @staticmethod
    def backward(ctx, grad, _):
        return _Flip.apply(grad, *ctx.saved_tensors, ctx.strides), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return _Flip.apply(tangent, *ctx.saved_tensors, ctx.strides), None

    @staticmethod
    def vmap(info, in_dims, x, batch_dims):
        return _Modulus.apply(x.movedim(in_dims[0], 0), batch_dims + 1), (0, 0)


class _Flip(Function):
    """``grad``, negated where ``signs`` has a bit; the result has ``strides``.  Linear in ``grad``."""

    @staticmethod
    def forward(grad, signs, strides):
        with _below_autograd():
            return _backward(grad, signs, _strides_if_other(grad, strides))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])
        ctx.strides = inputs[2]

    @staticmethod
    def backward(ctx, grad):
        return _Flip.apply(grad, *ctx.saved_tensors, ctx.strides), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Flip.apply(tangent, *ctx.saved_tensors, ctx.strides)

    @staticmethod
    def vmap(info, in_dims, grad, signs, strides):
        def batched(tensor, dim):
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        grad, signs = batched(grad, in_dims[0]), batched(signs, in_dims[1]).contiguous()
        return _Flip.apply(grad, signs, (grad[0].numel(), *strides)), 0


class _FastModulus(Function):
    """The same without transforms: the call and its backward cost less, which decides for small tensors."""

    @staticmethod
    def forward(ctx, x):
        with _below_autograd():
            y, signs = _forward(x)
        ctx.save_for_backward(signs)
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx, grad):
        (signs,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return _backward(grad, signs, ctx.strides)
        if torch.is_grad_enabled() or _transforming() or forward_ad._current_level >= 0:
            return _Flip.apply(grad, signs, ctx.strides)
        with _below_autograd():
            return _backward(grad, signs, _strides_if_other(grad, ctx.strides))


_apply_fast = super(Function, _FastModulus).apply  # without the Python wrapper that looks for transforms


class _ComplexModulus(Function):
    @staticmethod
    def forward(x):
        with _below_autograd():
            return _modulus(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return _complex_backward(grad, x)
        if torch.is_grad_enabled() or _transforming() or forward_ad._current_level >= 0:
            return grad * x.sgn()
        with _below_autograd():
            return _complex_backward(grad, x)

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return (x.sgn().conj() * tangent).real

    @staticmethod
    def vmap(info, in_dims, x):
        return _ComplexModulus.apply(x), in_dims[0]


# The second home.


@torch.library.register_fake("consistency_ops::modulus")
def _(x):
    return torch.empty_like(x, dtype=x.dtype.to_real())


@torch.library.register_fake("consistency_ops::modulus_forward")
def _(x, batch_dims=0):
    y = torch.empty_like(x) if batch_dims == 0 else x.new_empty(x.shape)
    rest = 1
    for size in x.shape[batch_dims:]:
        rest = rest * size
    return y, x.new_empty((*x.shape[:batch_dims], (rest + 7) // 8), dtype=torch.uint8)


@torch.library.register_fake("consistency_ops::modulus_backward")
def _(grad, signs, strides=None):
    return torch.empty_strided(
        grad.shape, grad.stride() if strides is None else strides, dtype=grad.dtype, device=grad.device
    )


@torch.library.register_fake("consistency_ops::modulus_complex_backward")
def _(grad, x):
    return torch.empty_like(x)


def _save_input(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _modulus_formula(ctx, grad):
    (x,) = ctx.saved_tensors
    return grad * x.sgn() if x.is_complex() else torch.where(x < 0, -grad, grad)


def _save_signs(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.strides = output[0].stride()


def _forward_formula(ctx, grad, _):
    return _backward(grad, *ctx.saved_tensors, ctx.strides), None


def _save_for_flip(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.strides = output.stride()


def _backward_formula(ctx, grad):
    return _backward(grad, *ctx.saved_tensors, ctx.strides), None, None


def _save_both(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _complex_backward_formula(ctx, grad):
    real_grad, x = ctx.saved_tensors
    direction = x.sgn()
    # d/dx of grad x / |x| is the part of the incoming gradient across x, over |x|.
    inner = (direction.conj() * grad).real
    across = torch.where(x == 0, 0, (grad - direction * inner) * real_grad / x.abs())
    return inner, across


torch.library.register_autograd("consistency_ops::modulus", _modulus_formula, setup_context=_save_input)
torch.library.register_autograd("consistency_ops::modulus_forward", _forward_formula, setup_context=_save_signs)
torch.library.register_autograd("consistency_ops::modulus_backward", _backward_formula, setup_context=_save_for_flip)
torch.library.register_autograd(
    "consistency_ops::modulus_complex_backward", _complex_backward_formula, setup_context=_save_both
)
