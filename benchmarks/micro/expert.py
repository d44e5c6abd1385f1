"""Tier B: the correction composed of cuBLAS and cuSOLVER calls for one CUDA graph.

Like compositions.py, but equal chunks of *all* layers are one batch: one Cholesky factorisation (potrfBatched), one
triangular solve of the identity (trsmBatched) and one product for the inverses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.micro.compositions import Division, assemble, blocks_of, flat, gather, gradient_blocks


def second_moment(x: Tensor) -> Tensor:
    """Return float32 (count, size, size) of (count, n, size); 16-bit inputs are summed in float32."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return torch.bmm(x.mT.float(), x.float())
    return torch.bmm(x.mT, x, out_dtype=torch.float32)


def inverses(covariances: list[Tensor]) -> list[Tensor]:
    """Invert symmetric positive definite matrices, (count, size, size) each; equal sizes make one batch."""
    of_size: dict[int, list[int]] = {}
    for i, covariance in enumerate(covariances):
        of_size.setdefault(covariance.shape[-1], []).append(i)
    results: list = [None] * len(covariances)
    for size, members in of_size.items():
        factor, _ = torch.linalg.cholesky_ex(torch.cat([covariances[i] for i in members]))
        identity = torch.eye(size, device=factor.device, dtype=factor.dtype).expand_as(factor)
        root = torch.linalg.solve_triangular(factor, identity, upper=False)
        split = torch.bmm(root.mT, root).split([len(covariances[i]) for i in members])
        for i, inverse in zip(members, split, strict=True):
            results[i] = inverse
    return results


def expert(grads: list[Tensor], inputs: list[Tensor], divisions: list[Division], damping: float) -> list[Tensor]:
    """Return new gradients: all covariances first, then all inverses, then all products."""
    keys, covariances = [], []
    for i, (rows, division) in enumerate(zip(inputs, divisions, strict=True)):
        x = gather(rows, division, division.order)
        for block in division.blocks:
            covariance = second_moment(blocks_of(x, *block)).mul_(1 / len(rows))
            covariance.diagonal(dim1=-2, dim2=-1).add_(damping)
            keys.append((i, block))
            covariances.append(covariance)
    inverse_of = dict(zip(keys, inverses(covariances), strict=True))
    results = []
    for i, (grad, division) in enumerate(zip(grads, divisions, strict=True)):
        g = flat(gather(grad, division, division.order).float())
        solved = [torch.bmm(gradient_blocks(g, block), inverse_of[i, block]) for block in division.blocks]
        corrected = assemble(solved, g).reshape(grad.shape).to(grad.dtype)
        results.append(gather(corrected, division, division.inverse))
    return results
