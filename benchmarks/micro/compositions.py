"""The correction composed of torch operations: the baselines, as an expert would write them.

They are given what the kernel has to compute: the random division as index tensors, whole groups of consecutive
units where they divide the layer (one copy of 32 bytes each instead of eight of 4), no cyclic offset, chunks of at most
two sizes.  They return new gradients instead of writing in place.  They move what they are given in its own dtype and
compute in float32, as accurately as the operator.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from benchmarks.micro.workloads import LayerShape


@dataclasses.dataclass(frozen=True)
class Division:
    """The order of a layer's units, as groups of ``group`` units, and its blocks (begin, chunks, size)."""

    group: int
    order: Tensor | None  # None: a single chunk
    inverse: Tensor | None
    blocks: tuple[tuple[int, int, int], ...]

    def permutation(self, units: int) -> Tensor:
        """Return the same division with one index per unit."""
        if self.order is None:
            return torch.arange(units)
        return (self.order[:, None] * self.group + torch.arange(self.group, device=self.order.device)).flatten()


def divide(layer: LayerShape, chunk: int, group: int, generator: torch.Generator) -> Division:
    count = -(-layer.units // chunk)
    size, larger = divmod(layer.units, count)
    blocks = [(0, larger, size + 1), (larger * (size + 1), count - larger, size)]
    blocks = tuple(block for block in blocks if block[1] > 0)
    if count == 1:
        return Division(1, None, None, blocks)
    group = group if layer.units % group == 0 else 1
    order = torch.randperm(layer.units // group, generator=generator)
    return Division(group, order, order.argsort(), blocks)


def gather(matrix: Tensor, division: Division, index: Tensor | None) -> Tensor:
    """Put units (dimension 1 of (rows, units)) in the order of the division, or back."""
    if index is None:
        return matrix
    if division.group == 1:
        return matrix.index_select(1, index)
    grouped = matrix.view(matrix.shape[0], -1, division.group * (matrix[0].numel() // (len(index) * division.group)))
    return grouped.index_select(1, index).view(matrix.shape)


def blocks_of(matrix: Tensor, begin: int, count: int, size: int) -> Tensor:
    """Return a view (count, rows, size) of (rows, units)."""
    return matrix[:, begin : begin + count * size].unflatten(1, (count, size)).transpose(0, 1)


def damped(rows: Tensor, block: tuple[int, int, int], damping: float) -> Tensor:
    x = blocks_of(rows, *block)
    covariance = torch.bmm(x.mT, x).mul_(1 / len(rows))
    covariance.diagonal(dim1=-2, dim2=-1).add_(damping)
    return covariance


def gradient_blocks(grad: Tensor, block: tuple[int, int, int]) -> Tensor:
    """Rearrange (out, units, taps) to (count, out * taps, size)."""
    begin, count, size = block
    out, _, taps = grad.shape
    if taps == 1:
        return blocks_of(grad[:, :, 0], *block)
    part = grad[:, begin : begin + count * size].unflatten(1, (count, size))
    return part.permute(1, 0, 3, 2).reshape(count, out * taps, size)


def assemble(solutions: list[Tensor], grad: Tensor) -> Tensor:
    """Invert ``gradient_blocks`` for all blocks: returns (out, units, taps)."""
    out, _, taps = grad.shape
    parts = [s.unflatten(1, (out, taps)).permute(1, 0, 3, 2).flatten(1, 2) for s in solutions]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def by_solve(gradients: Tensor, factor: Tensor) -> Tensor:
    return torch.cholesky_solve(gradients.mT, factor).mT


def by_inverse(gradients: Tensor, factor: Tensor) -> Tensor:
    return torch.bmm(gradients, torch.cholesky_inverse(factor))


def flat(grad: Tensor) -> Tensor:
    return grad.flatten(2) if grad.dim() > 2 else grad.unsqueeze(2)


def one_layer(grad: Tensor, rows: Tensor, division: Division, damping: float, finish) -> Tensor:
    """Correct one layer by gather, bmm, cholesky and ``finish``."""
    x = gather(rows, division, division.order).float()
    g = flat(gather(grad, division, division.order).float())
    solutions = []
    for block in division.blocks:
        factor, _ = torch.linalg.cholesky_ex(damped(x, block, damping))
        solutions.append(finish(gradient_blocks(g, block), factor))
    corrected = assemble(solutions, g).reshape(grad.shape).to(grad.dtype)
    return gather(corrected, division, division.inverse)


def per_layer(grads: list[Tensor], inputs: list[Tensor], divisions: list[Division], damping: float, finish):
    return [one_layer(*layer, damping, finish) for layer in zip(grads, inputs, divisions, strict=True)]


def batched(grads: list[Tensor], inputs: list[Tensor], divisions: list[Division], damping: float, finish):
    """Correct stacked layers of equal shape with one bmm, one cholesky and one solve or inverse for all chunks."""
    sets: dict = {}
    for i, (grad, rows) in enumerate(zip(grads, inputs, strict=True)):
        sets.setdefault((grad.shape, rows.shape), []).append(i)
    results: list = [None] * len(grads)
    for members in sets.values():
        blocks = divisions[members[0]].blocks
        x = [gather(inputs[i], divisions[i], divisions[i].order).float() for i in members]
        g = [flat(gather(grads[i], divisions[i], divisions[i].order).float()) for i in members]
        solutions = []
        for block in blocks:
            stacked = torch.cat([blocks_of(rows, *block) for rows in x])
            covariance = torch.bmm(stacked.mT, stacked).mul_(1 / stacked.shape[1])
            covariance.diagonal(dim1=-2, dim2=-1).add_(damping)
            factor, _ = torch.linalg.cholesky_ex(covariance)
            solved = finish(torch.cat([gradient_blocks(grad, block) for grad in g]), factor)
            solutions.append(solved.unflatten(0, (len(members), block[1])))
        for n, i in enumerate(members):
            corrected = assemble([s[n] for s in solutions], g[n]).reshape(grads[i].shape).to(grads[i].dtype)
            results[i] = gather(corrected, divisions[i], divisions[i].inverse)
    return results


def compiled(finish, whole: bool):
    """Compile ``per_layer`` for the whole list (``whole``), or only the function of one layer."""
    if whole:
        return torch.compile(per_layer)
    layer = torch.compile(one_layer)

    def run(grads, inputs, divisions, damping, finish):
        return [layer(*entry, damping, finish) for entry in zip(grads, inputs, divisions, strict=True)]

    return run


def sgemm(size: int):
    """Return a float32 matrix product and its number of operations."""
    a, b, c = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return lambda: torch.mm(a, b, out=c), 2 * math.prod((size, size, size))
