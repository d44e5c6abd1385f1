"""Every operation in a few lines of plain torch: the definition that tests, docs and fallbacks share.

Nothing here is fast.  The random division mirrors ``csrc/include/consistency_ops/random.h`` bit for bit; the rest
works in whatever floating dtype it is given, so a float64 call is the reference that decides who is right.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
MAX_TRIES = 3  # kMaxTries of csrc/include/consistency_ops/damping.h


# Randomness: the same numbers as random.h


def philox(seed: int, step: int, layer: int, purpose: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 of the counter (step, layer, purpose) under the 64-bit key ``seed``: four 32-bit words."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = step & _MASK, (step >> 32) & _MASK, layer & _MASK, purpose
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


ROW_DRAW, PAIR_DRAW = 1 << 31, 1 << 30  # kRowDraw and kPairDraw


def block_words(
    kinds: int | Tensor,
    levels: int | Tensor,
    count: int,
    seed: int = 0,
    step: int | Tensor = 0,
    layer: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """32 random bits for each of the blocks 0 .. count - 1 of rows, int64: word ``block % 4`` of their counters.

    ``kinds`` and ``levels``: numbers, or int64 tensors (n, 1) for a result of shape (n, count). ``step``: a number, or
    a tensor of one element. Tensors are on ``device``, where the result is.
    """
    counters = torch.arange(-(-count // 4), device=device) & 0xFFFFFF
    c3: Any = kinds | ((levels & 63) << 24) | counters
    low: Any = step & _MASK
    high: Any = (step >> 32) & _MASK
    zeros = torch.zeros_like(c3)
    c0, c1, c2 = zeros + low, zeros + high, zeros + (layer & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64; a shift brings the sign, the mask takes it
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], -1).flatten(-2)[..., :count]


def sample_rows(
    rows: int, max_rows: int, seed: int = 0, step: int = 0, layer: int = 0, device: torch.device | None = None
) -> Tensor:
    """The rows that are used of ``rows``, ascending: one, drawn at random, of every ``ceil(rows / max_rows)``.

    The last block of rows may be shorter. At least one row is used, unless there is none.
    """
    stride = max(1, -(-rows // max_rows))
    count = -(-rows // stride)
    begin = torch.arange(count, device=device) * stride
    if stride == 1:
        return begin
    words = block_words(ROW_DRAW, 0, count, seed, step, layer, device)
    return begin + ((words * (rows - begin).clamp(max=stride)) >> 32)


def _mix(value: Tensor, key: int) -> Tensor:
    h = (value + key) & _MASK
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def _feistel(x: Tensor, size: int, keys: tuple[int, ...]) -> Tensor:
    bits = max(2, (size - 1).bit_length())
    left_bits = bits // 2
    right_bits = bits - left_bits
    left_mask, right_mask = (1 << left_bits) - 1, (1 << right_bits) - 1
    left, right = x >> right_bits, x & right_mask
    for r in range(0, 8, 2):
        left = left ^ (_mix(right, keys[r]) & left_mask)
        right = right ^ (_mix(left, keys[r + 1]) & right_mask)
    return (left << right_bits) | right


def _bijection(size: int, keys: tuple[int, ...]) -> Tensor:
    x = torch.arange(size)
    pending = torch.ones(size, dtype=torch.bool)
    while pending.any():
        x = torch.where(pending, _feistel(x, size, keys), x)
        pending = x >= size
    return x


def division(units: int, chunk: int, group: int = 1, seed: int = 0, step: int = 0, layer: int = 0) -> Tensor:
    """Units in the order in which they are dealt to chunks, shape (units,), int64; cut it at ``chunk_bounds``.

    Runs of ``group`` consecutive units move together, after a random cyclic offset; ``group=1`` is the exact division
    of the paper.  A single chunk keeps the natural order.  In groups of a multiple of 8 units the offset is a multiple
    of half a group, and the units behind the last such multiple are not moved by it.
    """
    if units <= chunk:
        return torch.arange(units)
    turn = group // 2 if group % 8 == 0 else 1
    rotated = units // turn * turn
    offset = ((philox(seed, step, layer, 0)[1] * (units // turn)) >> 32) * turn
    keys = philox(seed, step, layer, 1) + philox(seed, step, layer, 2)
    full = units // group
    order = _bijection(full, keys)[:, None] * group + torch.arange(group)
    positions = torch.cat([order.flatten(), torch.arange(full * group, units)])
    return torch.where(positions < rotated, (positions + offset) % rotated, positions)


def chunk_bounds(units: int, chunk: int) -> list[int]:
    """Positions where the division is cut: ``ceil(units / chunk)`` chunks, equal within one unit, larger ones first."""
    chunks = -(-units // chunk)
    return [c * (units // chunks) + min(c, units % chunks) for c in range(chunks)] + [units] if units else [0]


# The correction


def _unit_rows(inputs: Tensor, grad_dim: int) -> Tensor:
    """Input as (rows, units): the last dimension holds the units of a linear layer, dimension 1 those of a
    convolution."""
    if grad_dim > 2 and inputs.dim() == grad_dim:
        return inputs.movedim(1, -1).flatten(0, -2)
    return inputs.flatten(0, -2)


def _covariance(rows: Tensor, bias: bool, max_rows: int, seed: int, step: int, layer: int) -> Tensor:
    """(units, units) second moment of the sampled rows; the mean is not removed; the bias is a last unit of ones."""
    rows = rows[sample_rows(len(rows), max_rows, seed, step, layer)]
    if bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return rows.T @ rows / max(1, len(rows))


def chunked_covariance(
    inputs: Tensor,
    *,
    chunk: int,
    group: int = 1,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
) -> Tensor:
    """Second moments of each chunk of units, shape (chunks, chunk, chunk), the tails of smaller chunks zero."""
    rows = inputs.flatten(0, -2)
    units = rows.shape[1]
    covariance = _covariance(rows, False, max_rows, seed, step, 0)
    order = division(units, chunk, group, seed, step) if permutation is None else permutation
    bounds = chunk_bounds(units, chunk)
    out = covariance.new_zeros(len(bounds) - 1, chunk, chunk)
    for c, (begin, end) in enumerate(itertools.pairwise(bounds)):
        index = order[begin:end]
        out[c, : end - begin, : end - begin] = covariance[index][:, index]
    return out


def trace_scale(finite_sum: Tensor, finite_count: Tensor) -> Tensor:
    """The scale of ``scaling="trace"``: the mean of the finite diagonal entries of a layer's covariance.

    Args:
        finite_sum: sum of the finite diagonal entries, one number per layer (or group of a convolution).
        finite_count: how many entries are finite, of the same shape.

    Returns:
        The mean where it is greater than 0, and 1 elsewhere. ``damping.h`` has the same rule for the kernels.
    """
    mean = finite_sum / finite_count
    return torch.where(mean > 0, mean, 1)


def trace_scale_of(diagonal: Tensor, units: int | None = None) -> Tensor:
    """:func:`trace_scale` over the last dimension of ``diagonal``.

    ``units``: number of entries that are not padding; padding is 0. ``None``: all of them.
    """
    finite = diagonal.isfinite()
    total = torch.where(finite, diagonal, 0).sum(-1)
    return trace_scale(total, (diagonal.shape[-1] if units is None else units) - (~finite).sum(-1))


def damped_cholesky(covariance: Tensor, damping: float) -> tuple[Tensor, int, float]:
    """The Cholesky factor of ``covariance + damping I``, with 10 and 100 times the damping after a failure.

    Returns:
        ``(factor, info, used)``. ``info`` is 0, or after :data:`MAX_TRIES` failures the order of the leading minor that
        is not positive definite (1 if the covariance is not finite). ``used``: the damping of the last try.
    """
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for tries in range(MAX_TRIES):
        used = damping * 10.0**tries
        factor, info = torch.linalg.cholesky_ex(covariance + used * eye)
        if not covariance.isfinite().all():
            info = info.clamp(min=1)
        if info == 0:
            break
    return factor, int(info), used


def _correct(matrix: Tensor, covariance: Tensor, damping: float) -> tuple[Tensor, int, float]:
    """``matrix (covariance + damping I)^-1``, or the matrix itself after three failures, each with ten times the
    damping."""
    factor, info, used = damped_cholesky(covariance, damping)
    if info != 0:
        return matrix, info, used
    corrected = torch.cholesky_solve(matrix.T, factor).T
    finite = corrected.isfinite().all(dim=1, keepdim=True)
    return torch.where(finite, corrected, matrix), 0, used


def precondition(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = 1.0,
    scaling: str = "absolute",
    chunk: int = 128,
    group: int = 1,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    layer: int = 0,
    bias_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The correction of arXiv 1708.00631: (corrected, corrected bias or None, info, damping_used).

    ``grad`` is (out, in) with ``inputs`` (..., in), or (out, in / groups, *kernel) with ``inputs`` (N, in, *spatial) or
    (rows, in).  All tensors have one floating dtype, in which everything is computed.
    """
    rows = _unit_rows(inputs, grad.dim())
    groups = rows.shape[1] // max(1, grad.shape[1])
    corrected = grad.clone()
    bias = None if bias_grad is None else bias_grad.clone()
    info, used = [], []
    if len(rows) == 0 or grad.numel() == 0:
        units = grad.shape[1] + (bias is not None)
        count = groups * (len(chunk_bounds(units, chunk)) - 1)
        return corrected, bias, torch.zeros(count, dtype=torch.int32), torch.full((count,), damping)

    for g in range(groups):
        out = slice(g * len(grad) // groups, (g + 1) * len(grad) // groups)
        units_in = rows[:, g * grad.shape[1] : (g + 1) * grad.shape[1]]
        covariance = _covariance(units_in, bias is not None, max_rows, seed, step, layer)
        taps = grad[out].flatten(2).transpose(1, 2) if grad.dim() > 2 else grad[out].unsqueeze(1)  # (out, taps, units)
        if bias_grad is not None:
            taps = torch.cat([taps, bias_grad[out, None, None].expand(-1, taps.shape[1], 1)], dim=2)
        units = taps.shape[2]
        if scaling == "trace":
            covariance = covariance / trace_scale_of(covariance.diagonal())
        order = division(units, chunk, group, seed, step, layer) if permutation is None else permutation
        bounds = chunk_bounds(units, chunk)
        result = taps.clone()
        for begin, end in itertools.pairwise(bounds):
            index = order[begin:end]
            block, failed, lam = _correct(taps[:, :, index].flatten(0, 1), covariance[index][:, index], damping)
            result[:, :, index] = block.reshape(*taps.shape[:2], -1)
            info.append(failed)
            used.append(lam)
        if bias is not None:
            result, copies = result[:, :, :-1], result[:, :, -1]
            bias[out] = copies.mean(dim=1)
        corrected[out] = result.transpose(1, 2).reshape(corrected[out].shape)
    return corrected, bias, torch.tensor(info, dtype=torch.int32), torch.tensor(used)


# Whitened coordinates


def whitening_factors(
    covariance: Tensor,
    *,
    damping: float = 0.1,
    scaling: str = "trace",
    chunk: int = 128,
    group: int = 1,
    seed: int = 0,
    layer: int = 0,
) -> list[Tensor]:
    """``L^-1`` of every chunk, ``L L^T = A / tau + damping I``, of a layer with the second moment ``A`` of its inputs.

    A chunk whose factorisation fails three times has the identity. The division is that of step 0.
    """
    units = len(covariance)
    if scaling == "trace":
        covariance = covariance / trace_scale_of(covariance.diagonal())
    order, factors = division(units, chunk, group, seed, 0, layer), []
    for begin, end in itertools.pairwise(chunk_bounds(units, chunk)):
        index = order[begin:end]
        lower, info, _ = damped_cholesky(covariance[index][:, index], damping)
        eye = torch.eye(len(index), dtype=covariance.dtype, device=covariance.device)
        factors.append(eye if info else torch.linalg.solve_triangular(lower, eye, upper=False))
    return factors


def multiply_by_chunks(
    matrix: Tensor,
    bias: Tensor | None,
    factors: list[Tensor],
    *,
    chunk: int = 128,
    group: int = 1,
    seed: int = 0,
    layer: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """``matrix[:, c] @ factors[c]`` for every chunk ``c`` of the units of (out, in) or (out, in, *kernel).

    With ``bias`` (out,) the bias is the last unit; every tap of a kernel maps a copy of it, and their mean is returned.
    """
    taps = matrix.flatten(2).transpose(1, 2) if matrix.dim() > 2 else matrix.unsqueeze(1)
    if bias is not None:
        taps = torch.cat([taps, bias[:, None, None].expand(-1, taps.shape[1], 1)], 2)
    units, result = taps.shape[2], taps.clone()
    order = division(units, chunk, group, seed, 0, layer)
    for (begin, end), factor in zip(itertools.pairwise(chunk_bounds(units, chunk)), factors, strict=True):
        index = order[begin:end]
        result[:, :, index] = taps[:, :, index] @ factor
    if bias is not None:
        result, bias = result[:, :, :-1], result[:, :, -1].mean(1)
    return result.transpose(1, 2).reshape(matrix.shape), bias


def unwhiten(
    weight: Tensor,
    before: Tensor,
    bias: Tensor | None,
    bias_before: Tensor | None,
    factors: list[Tensor],
    *,
    keep_norm: bool = True,
    **division_options: int,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias after a step whose displacement ``D``, ``weight - before``, was made in whitened coordinates:
    ``before + s D L^-1``, with ``s`` so that the norm of ``D`` is kept, or 1."""
    move = weight - before
    bias_move = None if bias is None or bias_before is None else bias - bias_before
    mapped, bias_mapped = multiply_by_chunks(move, bias_move, factors, **division_options)
    if keep_norm:
        old, new = (
            torch.cat([m.flatten(), *([] if b is None else [b])]).norm()
            for m, b in ((move, bias_move), (mapped, bias_mapped))
        )
        scale = old / new if new > 0 else torch.ones_like(new)
        mapped, bias_mapped = mapped * scale, None if bias_mapped is None else bias_mapped * scale
    moved_bias = None if bias_mapped is None or bias_before is None else bias_before + bias_mapped
    return before + mapped, moved_bias


def norm_scales(squares: Tensor) -> Tensor:
    """``s`` of every layer, from (layers, 2): ``|D|^2`` and ``|D L^-1|^2``. It is 1 where the latter is 0 or not
    finite."""
    ratio = (squares[:, 0] / squares[:, 1]).sqrt()
    return torch.where((squares[:, 1] > 0) & ratio.isfinite(), ratio, torch.ones_like(ratio))


# Activation and normalisation


def modulus(x: Tensor) -> Tensor:
    """|x| with derivative +1 at zero (real) or 0 (complex); adding zero turns -0.0 into 0.0."""
    return x.abs() if x.is_complex() else torch.where(x < 0, -x, x + 0)


def batch_rms_norm(
    x: Tensor,
    running_ms: Tensor,
    *,
    training: bool,
    num_batches: Tensor | None = None,
    decay: float = 0.1,
    eps: float = 1e-2,
) -> Tensor:
    """``running_ms`` (C) and ``num_batches`` (1) are updated in place in training; D is a constant."""
    with torch.no_grad():
        if training and x.numel() > 0:
            dims = [0, *range(2, x.dim())]
            mean_square = x.to(running_ms.dtype).square().mean(dims)
            running_ms.mul_(decay).add_((1 - decay) * mean_square)
            if num_batches is not None:
                num_batches += 1
        count = 0 if num_batches is None else int(num_batches)
        correction = 1 - decay**count if count > 0 else 1.0
        if running_ms.numel() == 0:
            return x.clone()
        denominator = (running_ms / correction + eps * (running_ms.max() + 1e-6)).sqrt()
    return (x / denominator.reshape(-1, *[1] * (x.dim() - 2))).to(x.dtype)


def _spd_factor(A: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of the lower triangle, the identity where there is none; a pivot that is not finite fails."""
    factor, info = torch.linalg.cholesky_ex(A)
    finite = factor.diagonal(dim1=-2, dim2=-1).isfinite()
    if A.shape[-1]:
        first = finite.to(torch.int32).argmin(-1).to(torch.int32) + 1
        info = torch.where((info == 0) & ~finite.all(-1), first, info)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.where((info == 0)[..., None, None], factor, identity), info


def _or_nan(results: Tensor, info: Tensor) -> Tensor:
    return torch.where((info == 0)[..., None, None], results, torch.nan).contiguous()


def spd_inverse(A: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of symmetric positive definite matrices, NaN for what is none, and ``info`` as LAPACK's ``potrf``."""
    factor, info = _spd_factor(A)
    return _or_nan(torch.cholesky_inverse(factor), info), info


def spd_solve(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """``X`` with ``A X = B`` for matrices as in :func:`spd_inverse`, and ``info``."""
    factor, info = _spd_factor(A)
    return _or_nan(torch.cholesky_solve(B, factor), info), info
