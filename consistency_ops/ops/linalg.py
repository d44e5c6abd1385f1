"""Batched inverse and solve of symmetric positive definite matrices: ``consistency_ops.linalg``.

Two operators, ``spd_inverse`` and ``spd_solve``, take batches of one shape; the functions here make that of whatever
``torch.linalg`` takes. In eager mode the derivatives are the autograd functions below, which call themselves and know
``torch.func`` and forward mode. ``torch.compile`` traces the operators, whose formulas are registered at the end of
this file; inside a compiled transform ``reference.py`` takes their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .. import reference
from .backend import call
from .checks import MAX_CHUNK, is_real
from .registration import register_autograd, register_fake

_FLOATS = frozenset({torch.float32, torch.float64})
_LOW = frozenset({torch.bfloat16, torch.float16})
_LinAlgError: type[RuntimeError] = torch._C._LinAlgError  # type: ignore[attr-defined]  # torch.linalg's, not in torch's types
_transforming = torch._C._are_functorch_transforms_active
_below_autograd = torch._C._AutoDispatchBelowAutograd


class InverseResult(NamedTuple):
    """What :func:`spd_inverse_ex` returns."""

    inverse: Tensor
    info: Tensor


class SolveResult(NamedTuple):
    """What :func:`spd_solve_ex` returns."""

    result: Tensor
    info: Tensor


def spd_inverse(A: Tensor) -> Tensor:
    """Return the inverse of every symmetric positive definite matrix of a batch.

    ``torch.linalg.inv`` for such matrices, at a fraction of its cost. Only the lower triangle is read, the diagonal
    included, as by ``torch.linalg.cholesky``; what is above it is taken to mirror it. The result is symmetric, bit for
    bit. It can be differentiated any number of times; the gradient of ``A`` is symmetric, as that of
    ``torch.linalg.cholesky``.

    Matrices of up to 256 rows are inverted by the library's kernels (on CUDA in float32, up to what its shared memory
    holds: 256 rows on H100, 160 on most consumer cards), others by ``torch.linalg``. On CUDA the call waits for the
    device, to raise; :func:`spd_inverse_ex` does not.

    Args:
        A: shape ``(*, n, n)``, any strides; float32 or float64, under autocast also bfloat16 and float16.

    Returns:
        A tensor of the shape of ``A``, contiguous.

    Raises:
        torch.linalg.LinAlgError: a matrix is not positive definite, or not finite; the message names the first one.
        RuntimeError: wrong shapes or dtypes, in ``torch.linalg``'s words.
        TypeError: ``A`` is no tensor.
    """
    inverse, info = _inverse_ex("linalg.spd_inverse", A)
    _raise_if_any("linalg.spd_inverse", info)
    return inverse


def spd_inverse_ex(A: Tensor, *, check_errors: bool = False) -> InverseResult:
    """Return the inverses as :func:`spd_inverse` does, and ``info`` instead of an error.

    Args:
        A: as of :func:`spd_inverse`.
        check_errors: raise as :func:`spd_inverse` does.

    Returns:
        ``(inverse, info)``. ``info`` is int32 and has the batch dimensions of ``A``: 0, or the order of the first
        leading minor that is not positive and finite, as of ``torch.linalg.cholesky_ex``. The inverse of such a matrix
        is NaN; the others are not touched by it. Nothing waits for a CUDA device.
    """
    _check_flag("linalg.spd_inverse_ex", check_errors)
    inverse, info = _inverse_ex("linalg.spd_inverse_ex", A)
    if check_errors:
        _raise_if_any("linalg.spd_inverse_ex", info)
    return InverseResult(inverse, info)


def spd_solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    """Solve ``A X = B`` for symmetric positive definite ``A``: ``torch.linalg.solve`` for such matrices.

    By Cholesky factorisation and substitution. ``A`` is read as by :func:`spd_inverse`, which also says what computes.
    A matrix that serves many right-hand sides through broadcasting is factored once. The solution can be
    differentiated any number of times in ``A`` and ``B``; the gradient of ``A`` is symmetric.

    Args:
        A: shape ``(*, n, n)``.
        B: right-hand sides: ``(*, n, k)``, ``(n,)``, or ``(*, n)`` with the batch dimensions of ``A``; a ``B`` of shape
            ``A.shape[:-1]`` is a batch of vectors, as in ``torch.linalg.solve``. Batch dimensions are broadcast. The
            dtype and device of ``A``.
        left: ``False`` solves ``X A = B``, with ``B`` of shape ``(*, k, n)``.

    Returns:
        ``X``, of the shape of ``B`` after broadcasting.

    Raises:
        torch.linalg.LinAlgError: a matrix is not positive definite, or not finite; the message names the first one.
        RuntimeError: wrong shapes, dtypes or devices, in ``torch.linalg``'s words.
        TypeError: an argument of another type.
    """
    result, info = _solve_ex("linalg.spd_solve", A, B, left)
    _raise_if_any("linalg.spd_solve", info)
    return result


def spd_solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> SolveResult:
    """Solve as :func:`spd_solve` does, with ``info`` instead of an error.

    Args:
        A, B, left: as of :func:`spd_solve`.
        check_errors: raise as :func:`spd_solve` does.

    Returns:
        ``(result, info)``; ``info`` is that of :func:`spd_inverse_ex`, and has the batch dimensions of ``A``.
    """
    _check_flag("linalg.spd_solve_ex", check_errors)
    result, info = _solve_ex("linalg.spd_solve_ex", A, B, left)
    if check_errors:
        _raise_if_any("linalg.spd_solve_ex", info)
    return SolveResult(result, info)


# Arguments


def _check_flag(op: str, value: bool, name: str = "check_errors") -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {value!r}")


def _matrix(op: str, name: str, tensor: Tensor) -> Tensor:
    """``tensor``, under autocast in float32; raise unless it has the layout and dtype of matrices to factor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise NotImplementedError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype in _LOW and torch.is_autocast_enabled(tensor.device.type):
        return tensor.float()
    if tensor.dtype not in _FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_complex():
            raise NotImplementedError(f"{op}: {name} must be real, got {kind}")
        if tensor.dtype in _LOW:
            raise RuntimeError(f"{op}: Low precision dtypes not supported. Got {kind}")
        raise RuntimeError(f"{op}: Expected a floating point tensor as input. Got {kind}")
    return tensor


def _square(op: str, A: Tensor) -> Tensor:
    A = _matrix(op, "A", A)
    if A.dim() < 2:
        raise RuntimeError(f"{op}: The input tensor A must have at least 2 dimensions.")
    if A.shape[-1] != A.shape[-2]:
        raise RuntimeError(
            f"{op}: A must be batches of square matrices, but they are {A.shape[-2]} by {A.shape[-1]} matrices"
        )
    return A


def _inverse_ex(op: str, A: Tensor) -> tuple[Tensor, Tensor]:
    return _inverse(_square(op, A))


def _solve_ex(op: str, A: Tensor, B: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    _check_flag(op, left, "left")
    A, B = _square(op, A), _matrix(op, "B", B)
    if A.dtype != B.dtype:
        a, b = (str(t.dtype).removeprefix("torch.") for t in (A, B))
        raise RuntimeError(
            f"{op}: Expected A and B to have the same dtype, but found A of type {a} and B of type {b} instead"
        )
    if A.device != B.device:
        raise RuntimeError(
            f"{op}: Expected A and B to be on the same device, but found A on {A.device} and B on {B.device} instead"
        )
    if B.dim() < 1:
        raise RuntimeError(f"{op}: The input tensor B must have at least 2 dimensions.")
    vector = B.dim() == 1 or (B.dim() == A.dim() - 1 and B.shape == A.shape[:-1])
    if vector:
        B = B.unsqueeze(-1)
    if A.shape[-1] != B.shape[-2 if left else -1]:
        equation, rows, columns = "AX = B" if left else "XA = B", B.shape[-2], B.shape[-1]
        raise RuntimeError(
            f"{op}: Incompatible shapes of A and B for the equation {equation} "
            f"({A.shape[-2]}x{A.shape[-1]} and {rows}x{columns})"
        )
    X, info = _broadcast_solve(A, B if left else B.mT)
    X = X if left else X.mT
    return X.squeeze(-1) if vector else X, info


def _broadcast_solve(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Solve with batch dimensions of any kind; those along which ``A`` is the same become columns of ``B``."""
    if A.shape[:-2] == B.shape[:-2]:
        return _solve(A, B)
    batch: torch.Size = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])  # type: ignore[no-untyped-call]
    of_a = (1,) * (len(batch) - A.dim() + 2) + A.shape[:-2]
    B = B.expand(*batch, *B.shape[-2:])
    folded = [d for d, size in enumerate(of_a) if size == 1]
    kept = [d for d, size in enumerate(of_a) if size != 1]
    order = [*kept, len(batch), *folded, len(batch) + 1]
    B = B.permute(order)
    spread = B.shape  # kept, n, folded, k
    n_at = len(kept)
    X, info = _solve(A.reshape(*spread[:n_at], *A.shape[-2:]), B.flatten(n_at + 1))
    back = sorted(range(len(order)), key=order.__getitem__)
    return X.reshape(spread).permute(back).contiguous(), info.reshape(A.shape[:-2])


def _raise_if_any(op: str, info: Tensor) -> None:
    """The error of the first matrix that is not positive definite; waits for the device."""
    if torch.compiler.is_compiling() or _transforming() or not is_real(info):
        torch._linalg_check_errors(info, "linalg.cholesky", is_matrix=info.dim() == 0)
        return
    with torch.no_grad():
        if not bool(info.any()):
            return
        flat = info.flatten()
        first = int((flat != 0).to(torch.uint8).argmax())
    where = "" if info.dim() == 0 else f"(Batch element {first}): "
    raise _LinAlgError(
        f"{op}: {where}The factorization could not be completed because the input is not positive-definite (the "
        f"leading minor of order {int(flat[first])} is not positive-definite)."
    )


# What computes


@functools.cache
def _largest_on_cuda(index: int, solves: bool) -> int:
    """Rows of the largest matrix whose tiles fit the shared memory of a block: for_size of csrc/cuda/linalg.cu."""
    device: Any = torch.cuda.get_device_properties(index)
    memory = device.shared_memory_per_block_optin - 6 * 1024
    side = MAX_CHUNK // 32
    while side and (side * (side + 1) // 2 + (side if solves else 0)) * 32 * 33 * 4 > memory:
        side -= 1
    return 32 * side


def _chunk(A: Tensor, solves: bool) -> int:
    """The rows of a matrix that the kernels factor; 0: the portable operator must."""
    n = A.shape[-1]
    if n > MAX_CHUNK or (A.is_cuda and is_real(A) and n > _largest_on_cuda(A.device.index, solves)):
        return 0
    return max(1, n)


def _call_inverse(A: Tensor) -> tuple[Tensor, Tensor]:
    inverse, info = call("spd_inverse", _chunk(A, False), (A,), A)
    return inverse, info


def _call_solve(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    result, info = call("spd_solve", _chunk(A, True), (A,), A, B)
    return result, info


def _differentiates(*tensors: Tensor) -> bool:
    if _transforming() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _inverse(A: Tensor) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return reference.spd_inverse(A) if _transforming() else _call_inverse(A)
    if _differentiates(A):
        return _apply_inverse(A)
    with _below_autograd():
        return _call_inverse(A)


def _solve(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return reference.spd_solve(A, B) if _transforming() else _call_solve(A, B)
    if _differentiates(A, B):
        return _apply_solve(A, B)
    with _below_autograd():
        return _call_solve(A, B)


def _symmetric(product: Tensor) -> Tensor:
    return (product + product.mT) / 2


def _inverse_backward(inverse: Tensor, grad: Tensor) -> Tensor:
    return -(inverse @ _symmetric(grad) @ inverse)


class _SpdInverse(Function):
    @staticmethod
    def forward(A: Tensor) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            return _call_inverse(A)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inverse, info = output
        ctx.mark_non_differentiable(info)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inverse)
        ctx.save_for_forward(inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Tensor | None:
        return None if grad is None else _inverse_backward(ctx.saved_tensors[0], grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, None]:
        return _inverse_backward(ctx.saved_tensors[0], tangent), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], A: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _inverse(A.movedim(in_dims[0], 0)), (0, 0)


class _SpdSolve(Function):
    @staticmethod
    def forward(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            return _call_solve(A, B)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        X, info = output
        ctx.mark_non_differentiable(info)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], X)
        ctx.save_for_forward(inputs[0], X)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None
        A, X = ctx.saved_tensors
        grad_b = _solve(A, grad)[0]
        return -_symmetric(grad_b @ X.mT) if ctx.needs_input_grad[0] else None, grad_b

    @staticmethod
    def jvp(ctx: Any, A_tangent: Tensor | None, B_tangent: Tensor | None) -> tuple[Tensor, None]:
        A, X = ctx.saved_tensors
        right = torch.zeros_like(X) if B_tangent is None else B_tangent
        if A_tangent is not None:
            right = right - _symmetric(A_tangent) @ X
        return _solve(A, right)[0], None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], A: Tensor, B: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
        a_dim, b_dim = in_dims
        if a_dim is None:  # more columns
            B = B.movedim(b_dim, -2)
            X, of_a = _solve(A, B.flatten(-2))
            return (X.reshape(B.shape).movedim(-2, 0), of_a), (0, None)
        A = A.movedim(a_dim, 0)
        B = B.expand(info.batch_size, *B.shape) if b_dim is None else B.movedim(b_dim, 0)
        return _solve(A, B), (0, 0)


_apply_inverse: Callable[[Tensor], tuple[Tensor, Tensor]] = _SpdInverse.apply
_apply_solve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _SpdSolve.apply


# Shapes and formulas for torch.compile and torch.export; eager mode uses the functions above.


@register_fake("spd_inverse")
def _(A: Tensor) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape), A.new_empty(A.shape[:-2], dtype=torch.int32)


@register_fake("spd_solve")
def _(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A.new_empty(B.shape), A.new_empty(A.shape[:-2], dtype=torch.int32)


def _save_inverse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output[0])


def _inverse_formula(ctx: Any, grad: Tensor, _: Tensor | None) -> Tensor:
    return _inverse_backward(ctx.saved_tensors[0], grad)


def _save_solution(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _solve_formula(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor]:
    A, X = ctx.saved_tensors
    grad_b, _info = _call_solve(A, grad)
    return -_symmetric(grad_b @ X.mT) if ctx.needs_input_grad[0] else None, grad_b


register_autograd("spd_inverse", _inverse_formula, setup_context=_save_inverse)
register_autograd("spd_solve", _solve_formula, setup_context=_save_solution)
