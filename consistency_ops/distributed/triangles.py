"""Symmetric matrices in flat buffers: what is sent is one triangle, without the padding of small chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Packing:
    """Lower triangles of chunks in flat buffers, one for every size of chunk that occurs."""

    def __init__(self, units: Sequence[int], lengths: list[int], chunk: int, device: torch.device) -> None:
        self._chunk = chunk
        self._lengths = lengths
        self._triangles: list[tuple[list[int], Tensor, Tensor]] = []  # layers, positions, mirrored positions
        sizes = [-(-u // -(-u // chunk)) for u in units]  # largest chunk of a layer
        for size in sorted(set(sizes)):
            row, column = torch.tril_indices(size, size, device=device)
            layers = [i for i, s in enumerate(sizes) if s == size]
            self._triangles.append((layers, row * chunk + column, column * chunk + row))

    def pack(self, matrices: list[Tensor]) -> list[Tensor]:
        """``matrices``: symmetric, (chunks, chunk, chunk) for each layer."""
        return [
            torch.cat([matrices[i] for i in layers]).flatten(1)[:, triangle].flatten()
            for layers, triangle, _ in self._triangles
        ]

    def unpack(self, buffers: list[Tensor], like: Tensor) -> list[Tensor]:
        matrices: dict[int, Tensor] = {}
        for (layers, triangle, mirror), buffer in zip(self._triangles, buffers, strict=True):
            lengths = [self._lengths[i] for i in layers]
            full = like.new_zeros(sum(lengths), self._chunk, self._chunk)
            full.flatten(1)[:, triangle] = full.flatten(1)[:, mirror] = buffer.view(len(full), -1)
            matrices.update(zip(layers, full.split(lengths), strict=True))
        return [matrices[i] for i in range(len(matrices))]


class SharedPacking:
    """Chunks in order, dealt to ranks in equal runs; the last ranks may have empty ones to fill up."""

    def __init__(
        self, units: Sequence[int], lengths: Sequence[int], chunk: int, ranks: int, rank: int, device: torch.device
    ) -> None:
        self._chunk = chunk
        chunks = sum(lengths)
        self._share = -(-chunks // ranks)
        self._padding = ranks * self._share - chunks
        sizes, layer_of, group_of, units_of_group = [], [], [], []
        for layer, (u, length) in enumerate(zip(units, lengths, strict=True)):
            count = -(-u // chunk)  # chunks of one convolution group; the first ones have the odd units
            for _ in range(length // count):
                sizes += [u // count + (c < u % count) for c in range(count)]
                layer_of += [layer] * count
                group_of += [len(units_of_group)] * count
                units_of_group.append(u)
        begin = rank * self._share
        self.my_units = (sizes + [1] * self._padding)[begin : begin + self._share]
        row, column = torch.tril_indices(max(sizes), max(sizes), device=device)
        self._triangle, self._mirror = row * chunk + column, column * chunk + row
        self.owner = torch.tensor(layer_of, device=device)
        self._group = torch.tensor(group_of, device=device)
        self._units_of_group = torch.tensor(units_of_group, device=device)
        self._mine = torch.arange(begin, begin + self._share, device=device).clamp(max=chunks - 1)

    def mean_diagonal(self, diagonals: Tensor, rows: Tensor) -> Tensor:
        """Mean diagonal entry of the layer (of the convolution group) of every chunk, from sums over ranks."""
        sums = diagonals.new_zeros(len(self._units_of_group)).index_add_(0, self._group, diagonals)
        tau = (sums / self._units_of_group)[self._group] / rows[self.owner]
        return torch.where(tau > 0, tau, 1)

    def pack(self, matrices: Tensor) -> Tensor:
        """(chunks, chunk, chunk) to (ranks * share, triangle), zeros at the end."""
        return torch.nn.functional.pad(self.triangles(matrices), (0, 0, 0, self._padding))

    def triangles(self, matrices: Tensor) -> Tensor:
        return matrices.flatten(1)[:, self._triangle]

    def full(self, triangles: Tensor) -> Tensor:
        matrices = triangles.new_zeros(len(triangles), self._chunk, self._chunk)
        matrices.flatten(1)[:, self._triangle] = matrices.flatten(1)[:, self._mirror] = triangles
        return matrices

    def unpack_mine(self, sums: Tensor, rows: Tensor, tau: Tensor | None) -> Tensor:
        """This rank's chunks: averages over rows, in units of the mean diagonal entry."""
        scale = rows[self.owner[self._mine]]
        return self.full(sums / (scale if tau is None else scale * tau[self._mine])[:, None])
