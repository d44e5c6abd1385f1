"""Spectral norms of matrices and convolutions. They are never too small, because certificates are built on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .time_limit import is_limited, out_of_time

_DIRECT = 2048  # matrices with a smaller side up to this get an exact decomposition
_BUDGET = 3e9  # multiplications of one pass over the frequencies of a convolution
_HURRIED = 1e9  # multiplications of one decomposition, beyond which there is none in a limited time


def _safe(value: float, size: int) -> float:
    """Raise ``value`` by more than the rounding of a float64 decomposition of ``size``."""
    return value * (1 + 8 * size * 2.3e-16)


def wide(weight: Tensor) -> Tensor:
    """Return the weight in double precision, complex numbers too."""
    return weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64)


def gram_bound(a: Tensor, iterations: int = 12) -> Tensor:
    """Return upper bounds of the spectral norms of the matrices ``a`` (..., m, n), closer with every iteration.

    G <- G^H G squares the singular values, and sigma_max(a) <= |G|_F^(1/2^k) after k steps: an iteration that, unlike
    the power iteration, comes from above. After k steps the bound is at most rank^(1/2^(k+1)) times too large.
    (Delattre et al., ICML 2023, "Efficient bound of Lipschitz constant for convolutional layers by Gram iteration".)
    """
    if a.shape[-2] < a.shape[-1]:
        a = a.mH
    log = torch.zeros(a.shape[:-2], dtype=torch.float64, device=a.device)
    for k in range(iterations + 1):
        norm = torch.linalg.matrix_norm(a).clamp(min=torch.finfo(torch.float32).tiny)
        log = log + norm.double().log() / 2**k
        a = a / norm[..., None, None]
        if k < iterations:
            a = a.mH @ a
    return log.exp() * (1 + 1e-12)


def _in_a_hurry(multiplications: float) -> bool:
    """Whether a certificate must do with a rougher bound, which is still one: there is a time limit, and it is near."""
    return is_limited() and (multiplications > _HURRIED or out_of_time())


def _rough(matrix: Tensor) -> float:
    """An upper bound of the spectral norm in one pass: Frobenius' norm, or Schur's row and column sums."""
    sizes = matrix.abs()
    schur = float(sizes.sum(0).max() * sizes.sum(1).max()) ** 0.5
    return _safe(min(float(torch.linalg.matrix_norm(matrix)), schur), matrix.numel())


def matrix_norm(weight: Tensor) -> tuple[float, bool]:
    """Return (norm, exact): the spectral norm, or an upper bound at most 0.1 % too large for very large matrices."""
    weight = wide(weight)
    if not weight.numel():
        return 0.0, True
    if not weight.isfinite().all():
        return math.inf, False
    if _in_a_hurry(min(weight.shape) ** 2 * max(weight.shape)):
        return _rough(weight), False
    if min(weight.shape) <= _DIRECT:
        return _safe(float(torch.linalg.svdvals(weight)[0]), max(weight.shape)), True
    return float(gram_bound(weight)), False


def convolution_norm(
    weight: Tensor,
    *,
    stride: Sequence[int] = (1,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    circular: Sequence[int] | None = None,
) -> tuple[float, bool]:
    """Return the l2 norm of a convolution with ``weight`` (out, in / groups, ``*kernel``) for images of any size.

    On an unbounded image, of which a zero-padded one is a part, the norm is the largest spectral norm of the kernel's
    Fourier transform over all frequencies. A stride is removed by splitting the image into its phases, which are more
    input channels of a smaller convolution without stride. On a grid of N frequencies a side, the squared norm, a
    trigonometric polynomial of degree q - 1 for a kernel of q taps along every line, can exceed its largest value by
    the factor 1 / cos(pi (q - 1) / N) at most (Ehlich and Zeller, 1964), which is multiplied in.

    ``circular``: image size, for a convolution that is circular: there the N frequencies are all there are, and the
    norm is exact. Returns (norm, exact).
    """
    weight = wide(weight)
    if not weight.numel():
        return 0.0, True
    if not weight.isfinite().all():
        return math.inf, False
    dims = weight.dim() - 2
    stride, dilation = (tuple(v) * (dims if len(v) == 1 else 1) for v in (stride, dilation))
    out, channels = weight.shape[:2]
    kernel = weight.reshape(groups, out // groups, channels, *weight.shape[2:])
    for axis in range(dims):
        if stride[axis] > 1 or circular is not None:
            kernel = _phases(kernel, 3 + axis, stride[axis], dilation[axis])
    kernel = kernel.reshape(groups, out // groups, -1, *kernel.shape[3 : 3 + dims])
    taps = kernel.shape[3:]
    small, large = sorted(kernel.shape[1:3])
    if circular is not None:
        sizes = [n // s for n, s in zip(circular, stride, strict=True)]
        kernel = _wrap(kernel, sizes)
        return _safe(_largest(torch.fft.fftn(kernel, dim=tuple(range(3, 3 + dims))), dims), small), True
    budget = _HURRIED if is_limited() else _BUDGET
    for oversampling in (32, 16, 8, 4):
        sizes = [1 if q == 1 else oversampling * (q - 1) for q in taps]
        work = groups * math.prod(sizes) / 2 * small**2 * large
        if work <= budget:
            break
    factor = math.prod(1 / math.sqrt(math.cos(math.pi * (q - 1) / n)) for q, n in zip(taps, sizes, strict=True))
    # An image meets each tap's matrix once: sqrt(taps) times the norm of the kernel as one matrix.
    plain = max(matrix_norm(part.flatten(1))[0] for part in kernel) * math.sqrt(math.prod(taps))
    if _in_a_hurry(work):
        return plain, False
    # The spectrum of a real kernel is symmetric: half of it is enough.
    transform = torch.fft.fftn if kernel.is_complex() else torch.fft.rfftn
    spectrum = transform(kernel, s=sizes, dim=tuple(range(3, 3 + dims)))
    bound = _safe(_largest(spectrum, dims) * factor, small)
    return min(bound, plain), math.prod(taps) == 1


def _phases(kernel: Tensor, axis: int, stride: int, dilation: int) -> Tensor:
    """Split taps t = stride q + r along ``axis``: q stays there, r joins the input channels (dimension 2)."""
    length = (kernel.shape[axis] - 1) * dilation + 1
    shape = list(kernel.shape)
    shape[axis] = -(-length // stride) * stride
    spread = kernel.new_zeros(shape)
    spread.index_copy_(axis, torch.arange(0, length, dilation, device=kernel.device), kernel)
    split = spread.reshape(*shape[:axis], -1, stride, *shape[axis + 1 :]).movedim(axis + 1, 3)
    return split.flatten(2, 3)


def _wrap(kernel: Tensor, sizes: Sequence[int]) -> Tensor:
    """Add taps beyond the image to those on the other side."""
    for axis, n in enumerate(sizes, 3):
        q = kernel.shape[axis]
        padded = torch.nn.functional.pad(kernel, (0, 0) * (kernel.dim() - 1 - axis) + (0, -q % n))
        kernel = padded.reshape(*padded.shape[:axis], -1, n, *padded.shape[axis + 1 :]).sum(axis)
    return kernel


def _largest(spectrum: Tensor, dims: int) -> float:
    """Return the largest singular value of (groups, out, in, ``*frequencies``) over groups and frequencies.

    Upper bounds by Gram iteration, in single precision, discard most of the frequencies; the rest are decomposed.
    """
    matrices = spectrum.movedim((1, 2), (-2, -1)).flatten(0, dims)
    scale = float(matrices.abs().amax())  # squares neither overflow nor vanish
    if scale == 0:
        return 0.0
    matrices = matrices / scale
    if len(matrices) > 16 and min(matrices.shape[-2:]) > 1:
        upper = gram_bound(matrices.to(torch.complex64), 4).double() * (1 + 1e-3)
        top = upper.argsort(descending=True)[:8]
        best = float(torch.linalg.svdvals(matrices[top])[:, 0].max())
        rest = upper >= best
        rest[top] = False
        matrices = matrices[rest]
    else:
        best = 0.0
    # The largest eigenvalue of the smaller Gram matrix is as accurate as its square root needs.
    if not len(matrices):
        return best * scale
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.mH
    return scale * max(best, math.sqrt(float(torch.linalg.eigvalsh(matrices.mH @ matrices)[:, -1].max())))
