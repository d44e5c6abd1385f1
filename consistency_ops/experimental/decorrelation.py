"""Pixel-wise decorrelation of convolution gradients, from the outlook in the last section of arXiv 1708.00631.

The correction of the paper treats the pixels of a feature map as independent samples: its matrix is channels by
channels.  These two functions know the correlation between neighbouring pixels too, exactly or in Fourier space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ..ops.checks import check_integers, check_numbers, check_tensor, shown


@torch.no_grad()
def decorrelate_im2col(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = 1.0,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    max_rows: int = 10_000,
) -> Tensor:
    """Return grad (M + damping I)^-1 with the second moment M of the input patches, (in kh kw) x (in kh kw).

    ``grad`` (out, in, kh, kw) is the weight gradient of a ``Conv2d`` with zero padding and one group, ``inputs``
    (N, in, H, W) its input, ``stride``, ``padding`` and ``dilation`` those of the layer, a number or a pair; the result
    has the shape and dtype of ``grad``.  M is the mean over output positions and images, of at most ``max_rows``
    patches, evenly spaced: the normal equations of the layer, exact where all are used.
    ``damping`` > 0 is absolute.  An empty batch, and inputs that are not finite, leave the gradient as it is.  With
    d = in kh kw the cost is max_rows d^2 + d^3 / 3 + out d^2.

    Raises:
        ValueError: shapes that do not fit, or an argument out of range. TypeError, NotImplementedError: dtypes that
        are not floating point; complex or sparse tensors. RuntimeError: tensors on two devices.
    """
    op = "decorrelate_im2col"
    _check(op, grad, inputs, damping)
    check_integers(op, max_rows=max_rows)
    if max_rows < 1:
        raise ValueError(f"{op}: max_rows must be at least 1, got {max_rows}")
    sh, sw = _pair(op, "stride", stride, 1)
    ph, pw = _pair(op, "padding", padding, 0)
    dh, dw = _pair(op, "dilation", dilation, 1)
    kh, kw = grad.shape[2:]
    x = functional.pad(inputs, (pw, pw, ph, ph)).to(_compute(grad))
    span = (dh * (kh - 1) + 1, dw * (kw - 1) + 1)
    if x.shape[2] < span[0] or x.shape[3] < span[1]:
        raise ValueError(
            f"decorrelate_im2col: the kernel must fit the padded image, got {span} and {tuple(x.shape[2:])}"
        )
    if not len(x) or not grad.numel():
        return grad.clone()
    windows = x.unfold(2, span[0], sh).unfold(3, span[1], sw)[..., ::dh, ::dw]  # a view: (N, in, H', W', kh, kw)
    images, height, width = windows.shape[0], *windows.shape[2:4]
    position = torch.arange(0, images * height * width, math.ceil(images * height * width / max_rows), device=x.device)
    n, h, w = position // (height * width), position // width % height, position % width
    rows = windows[n, :, h, w].flatten(1)
    moment = rows.T @ rows / len(rows)
    moment.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(moment)
    solved = torch.cholesky_solve(grad.flatten(1).to(rows.dtype).T, factor).T.reshape(grad.shape)
    return _solved_or_as_it_was(solved, info, grad)


@torch.no_grad()
def decorrelate_fft(
    grad: Tensor, inputs: Tensor, *, damping: float = 1.0, padding: int | tuple[int, int] = 0
) -> Tensor:
    """Approximate :func:`decorrelate_im2col` in Fourier space: one in x in system per frequency of the padded image.

    With periodic boundaries the second moment of whole-image patches is diagonal in Fourier space.  ``grad``
    (out, in, kh, kw) is embedded in an image, transformed, solved against the mean cross spectrum of ``inputs`` plus
    ``damping``, transformed back and cropped to the kernel.  Exact for periodic images and kernels as large as the
    image; otherwise an approximation: a projection on the support, and a wrap at the border.  ``padding`` is that of
    the layer, a number or a pair; the layer must have stride and dilation 1.  Cost:
    (H W / 2) (in^3 / 3 + in^2 (N + out)), complex, and the transforms.

    Raises:
        ValueError: shapes that do not fit, or an argument out of range. TypeError, NotImplementedError: dtypes that
        are not floating point; complex or sparse tensors. RuntimeError: tensors on two devices.
    """
    _check("decorrelate_fft", grad, inputs, damping)
    ph, pw = _pair("decorrelate_fft", "padding", padding, 0)
    kh, kw = grad.shape[2:]
    x = functional.pad(inputs, (pw, pw, ph, ph)).to(_compute(grad))
    size = x.shape[2:]
    if size[0] < kh or size[1] < kw:
        raise ValueError(f"decorrelate_fft: the kernel must fit the padded image, got {(kh, kw)} and {tuple(size)}")
    if not len(x) or not grad.numel():
        return grad.clone()
    spectrum = torch.fft.rfft2(x).permute(2, 3, 1, 0)  # (H, W', in, N)
    moment = spectrum @ spectrum.mH / (len(x) * size[0] * size[1])
    moment.diagonal(dim1=-2, dim2=-1).add_(damping)
    transformed = torch.fft.rfft2(grad.to(x.dtype), s=size).permute(2, 3, 1, 0)  # (H, W', in, out)
    factor, info = torch.linalg.cholesky_ex(moment)
    solved = torch.cholesky_solve(transformed, factor).permute(3, 2, 0, 1)
    return _solved_or_as_it_was(torch.fft.irfft2(solved, s=size)[..., :kh, :kw], info, grad)


def _solved_or_as_it_was(solved: Tensor, info: Tensor, grad: Tensor) -> Tensor:
    """Return ``solved``, or ``grad`` if a factorisation failed or the result is not finite."""
    return torch.where((info == 0).all() & solved.isfinite().all(), solved.to(grad.dtype), grad)


def _check(owner: str, grad: Tensor, inputs: Tensor, damping: float) -> None:
    check_tensor(owner, "grad", grad)
    check_tensor(owner, "inputs", inputs)
    if grad.device != inputs.device:
        raise RuntimeError(f"{owner}: grad and inputs must be on one device, got {grad.device} and {inputs.device}")
    check_numbers(owner, damping=damping)
    if grad.dim() != 4 or inputs.dim() != 4 or inputs.shape[1] != grad.shape[1]:
        raise ValueError(
            f"{owner}: grad must be (out, in, kh, kw) and inputs (N, in, H, W), got {tuple(grad.shape)} and "
            f"{tuple(inputs.shape)}"
        )
    if not 0 < damping < math.inf:
        raise ValueError(f"{owner}: damping must be positive and finite, got {damping}")


def _compute(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def _pair(op: str, name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{op}: {name} must be an integer or a pair of integers, at least {least}, got {shown(value)}")
    return pair[0], pair[1]
