"""The modulus and batch RMS normalisation out of torch's own operations; the bits of signs lie as the kernels' do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _memory_order(tensor: Tensor) -> list[int]:
    """The dimensions of a dense tensor from the outermost in memory to the innermost."""
    return sorted(range(tensor.dim()), key=lambda d: (-tensor.stride()[d], -tensor.shape[d], d))


def modulus(x: Tensor) -> Tensor:
    return _abs(x) if not x.is_complex() else x.abs()


def _abs(x: Tensor) -> Tensor:
    return torch.abs(x, out=torch.empty_like(x))  # whose strides are also right where a size is 1


def modulus_forward(x: Tensor, batch_dims: int = 0) -> tuple[Tensor, Tensor]:
    y = _abs(x)
    if batch_dims:
        y = y.contiguous()
        negative = x < 0
    else:
        negative = (x < 0).permute(_memory_order(y))
    shape = tuple(x.shape[:batch_dims])
    length = math.prod(x.shape[batch_dims:])
    bits = negative.reshape(math.prod(shape), length).to(torch.uint8)
    row_bytes = (length + 7) // 8
    bits = torch.nn.functional.pad(bits, (0, 8 * row_bytes - length)).view(len(bits), row_bytes, 8)
    weights = torch.ones(8, dtype=torch.uint8, device=x.device) << torch.arange(8, dtype=torch.uint8, device=x.device)
    return y, (bits * weights).sum(-1, dtype=torch.uint8).view(*shape, row_bytes)


def modulus_backward(grad: Tensor, signs: Tensor, strides: Sequence[int] | None = None) -> Tensor:
    row_bytes = signs.shape[-1] if signs.dim() else 0
    rows = signs.numel() // row_bytes if row_bytes else 0
    length = grad.numel() // rows if rows else 0
    if (
        signs.dtype != torch.uint8
        or (length + 7) // 8 != row_bytes
        or rows * length != grad.numel()
        or (strides is not None and len(strides) != grad.dim())
    ):
        raise RuntimeError(
            "modulus_backward: signs and strides must be those of a forward result of the shape of grad, got signs "
            f"{tuple(signs.shape)}, strides {strides} and grad {tuple(grad.shape)}"
        )
    strides = grad.stride() if strides is None else strides
    out = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)
    order = _memory_order(out)
    whole = out.permute(order)
    if not whole.is_contiguous():
        raise RuntimeError(f"modulus_backward: the strides must be those of a dense tensor, got {tuple(strides)}")
    shifts = torch.arange(8, dtype=torch.uint8, device=grad.device)
    bits = (signs.view(rows, row_bytes, 1) >> shifts).bitwise_and(1).view(rows, 8 * row_bytes)[:, :length]
    flipped = bits.reshape(whole.shape).to(torch.bool)
    permuted = grad.permute(order)
    whole.copy_(torch.where(flipped, -permuted, permuted))
    return out


def modulus_complex_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not x.is_complex() or grad.dtype != x.dtype.to_real() or grad.shape != x.shape:
        raise RuntimeError(
            "modulus_complex_backward: x must be complex and grad have its shape and the type of its parts, got "
            f"{x.dtype} {tuple(x.shape)} and {grad.dtype} {tuple(grad.shape)}"
        )
    return x.sgn().mul_(grad)


def batch_rms_norm_denominator_(
    x: Tensor, running_ms: Tensor, num_batches: Tensor | None, decay: float, eps: float
) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel():
        mean = x.to(torch.promote_types(dtype, running_ms.dtype)).square().mean([0, *range(2, x.dim())])
        running_ms.copy_(decay * running_ms + (1 - decay) * mean)
        if num_batches is not None:
            num_batches.add_(1)
    return batch_rms_norm_denominator(running_ms, num_batches, dtype, decay, eps)


def batch_rms_norm_denominator(
    running_ms: Tensor, num_batches: Tensor | None, dtype: torch.dtype, decay: float, eps: float
) -> Tensor:
    v = running_ms.to(torch.promote_types(dtype, running_ms.dtype))
    if v.numel() == 0:
        return v.to(dtype)
    floor = eps * (v.max().clamp(min=0) + 1e-6)
    if num_batches is not None:
        counted = num_batches.to(v.dtype)
        v = v / torch.where(counted > 0, 1 - torch.pow(decay, counted), 1)
    return (v + floor).sqrt().to(dtype)


def batch_rms_norm_divide(x: Tensor, denominator: Tensor) -> Tensor:
    return (x / denominator.view(-1, *[1] * (x.dim() - 2))).to(x.dtype)
