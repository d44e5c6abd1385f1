"""Symmetric matrices in flat buffers: what is sent is one triangle, without the padding of small chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import trace_scale


class Triangles:
    """Lower triangles of chunks in flat buffers, one buffer for every size of chunk that occurs.

    Args:
        units: of each layer (of one group of a convolution), the bias included.
        lengths: number of chunks of each layer.
        chunk: number of rows and columns of every matrix; smaller chunks are padded with zeros.
        device: where the matrices are.
    """

    def __init__(self, units: Sequence[int], lengths: list[int], chunk: int, device: torch.device) -> None:
        self._chunk = chunk
        self._lengths = lengths
        self._by_size: list[tuple[list[int], Tensor, Tensor]] = []  # layers, positions, mirrored positions
        sizes = [-(-u // -(-u // chunk)) for u in units]  # largest chunk of a layer
        for size in sorted(set(sizes)):
            row, column = torch.tril_indices(size, size, device=device)
            layers = [i for i, s in enumerate(sizes) if s == size]
            self._by_size.append((layers, row * chunk + column, column * chunk + row))

    def flatten(self, matrices: list[Tensor]) -> list[Tensor]:
        """Flat buffers of symmetric matrices, (chunks, chunk, chunk) for each layer."""
        return [
            torch.cat([matrices[i] for i in layers]).flatten(1)[:, triangle].flatten()
            for layers, triangle, _ in self._by_size
        ]

    def unflatten(self, buffers: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """The matrices of each layer, as ``flatten`` took them; dtype and device are those of ``like``."""
        matrices: dict[int, Tensor] = {}
        for (layers, triangle, mirror), buffer in zip(self._by_size, buffers, strict=True):
            lengths = [self._lengths[i] for i in layers]
            full = like.new_zeros(sum(lengths), self._chunk, self._chunk)
            full.flatten(1)[:, triangle] = full.flatten(1)[:, mirror] = buffer.view(len(full), -1)
            matrices.update(zip(layers, torch.split(full, lengths), strict=True))
        return [matrices[i] for i in range(len(matrices))]


class DealtTriangles:
    """The chunks of all layers in order, dealt to ranks in runs of equal length.

    The last ranks may get fewer chunks; zeros fill up their runs.

    Args:
        units, lengths, chunk, device: as for :class:`Triangles`.
        ranks: number of ranks that share the chunks.
        rank: this one.
    """

    def __init__(
        self, units: Sequence[int], lengths: Sequence[int], chunk: int, ranks: int, rank: int, device: torch.device
    ) -> None:
        self._chunk = chunk
        chunks = sum(lengths)
        self._share = -(-chunks // ranks)
        self._padding = ranks * self._share - chunks
        sizes: list[int] = []
        layer_of: list[int] = []
        scope_of: list[int] = []  # scope: a layer, or one group of a convolution
        units_of_scope: list[int] = []
        for layer, (u, length) in enumerate(zip(units, lengths, strict=True)):
            count = -(-u // chunk)  # chunks of one scope; the first ones have the odd units
            for _ in range(length // count):
                sizes += [u // count + (c < u % count) for c in range(count)]
                layer_of += [layer] * count
                scope_of += [len(units_of_scope)] * count
                units_of_scope.append(u)
        begin = rank * self._share
        self.my_units: list[int] = (sizes + [1] * self._padding)[begin : begin + self._share]
        row, column = torch.tril_indices(max(sizes), max(sizes), device=device)
        self._triangle, self._mirror = row * chunk + column, column * chunk + row
        self.layer_of_chunk: Tensor = torch.tensor(layer_of, device=device)
        self.diagonal_length: int = chunks * max(sizes)  # numbers in `diagonals`
        self._largest = max(sizes)
        self._scope = torch.tensor(scope_of, device=device)
        self._units_of_scope = torch.tensor(units_of_scope, device=device)
        self._mine = torch.arange(begin, begin + self._share, device=device).clamp(max=chunks - 1)

    def diagonals(self, matrices: Tensor) -> Tensor:
        """The diagonals of all chunks in one flat buffer; small chunks are padded with zeros."""
        return matrices.diagonal(dim1=1, dim2=2)[:, : self._largest].flatten()

    def trace_scale(self, diagonals: Tensor, rows: Tensor) -> Tensor:
        """The trace scale that belongs to every chunk: that of its layer, or of its convolution group.

        Args:
            diagonals: flat buffer of :meth:`diagonals`, added up over the ranks.
            rows: number of input rows behind each layer's sum.
        """
        diagonals = diagonals.view(-1, self._largest) / rows[self.layer_of_chunk, None]
        finite = diagonals.isfinite()
        scopes = diagonals.new_zeros(len(self._units_of_scope))
        total = scopes.index_add(0, self._scope, torch.where(finite, diagonals, 0).sum(1))
        not_finite = scopes.index_add(0, self._scope, (~finite).sum(1).to(scopes.dtype))
        return trace_scale(total, self._units_of_scope - not_finite)[self._scope]

    def deal(self, matrices: Tensor) -> Tensor:
        """(chunks, chunk, chunk) to (ranks * share, numbers of a triangle), zeros at the end."""
        return torch.nn.functional.pad(self.triangles(matrices), (0, 0, 0, self._padding))

    def triangles(self, matrices: Tensor) -> Tensor:
        """The lower triangle of each matrix, (matrices, numbers of a triangle)."""
        return matrices.flatten(1)[:, self._triangle]

    def full(self, triangles: Tensor) -> Tensor:
        """The symmetric matrices of :meth:`triangles`, (matrices, chunk, chunk)."""
        matrices = triangles.new_zeros(len(triangles), self._chunk, self._chunk)
        matrices.flatten(1)[:, self._triangle] = matrices.flatten(1)[:, self._mirror] = triangles
        return matrices

    def my_means(self, sums: Tensor, rows: Tensor, tau: Tensor | None) -> Tensor:
        """This rank's chunks, averaged over the rows and, if ``tau`` is given, divided by their trace scale."""
        scale = rows[self.layer_of_chunk[self._mine]]
        return self.full(sums / (scale if tau is None else scale * tau[self._mine])[:, None])
