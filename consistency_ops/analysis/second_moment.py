"""Spectra of second moments, exact in float64, from the smaller of the two Gram matrices."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..reference import chunk_bounds, damped_cholesky, division, sample_rows, trace_scale_of


def unit_rows(x: Tensor, unit_dim: int, max_rows: int | None, units: Tensor | None = None) -> tuple[Tensor, int]:
    """Return one row of every ``ceil(M / max_rows)`` as a float64 copy (rows, units), and M, the number of all rows.

    ``units``: the indices of those to take; None: all.
    """
    rows = x.movedim(unit_dim, -1)
    if units is not None:
        rows = rows.index_select(-1, units.to(x.device))
    rows = rows.reshape(-1, rows.shape[-1])
    count = len(rows)
    if max_rows is not None and count > max_rows:
        rows = rows[sample_rows(count, max_rows, device=rows.device)]
    return rows.to(torch.float64, copy=True), count


class SecondMoment:
    """The second moment (1/n) X^T X of rows that come in parts. While they are fewer than the units, rows are kept."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.gram: Tensor | None = None  # sum over all rows, not divided by their number
        self.count: int = 0

    def add(self, rows: Tensor) -> None:
        self.count += len(rows)
        if self.rows is not None:
            rows, self.rows = torch.cat([self.rows, rows]), None
        if self.gram is None and len(rows) < rows.shape[1]:
            self.rows = rows
        else:
            product = rows.T @ rows
            self.gram = product if self.gram is None else self.gram + product

    @property
    def _matrix(self) -> Tensor:
        """The rows, or their Gram matrix where that is kept instead."""
        matrix = self.rows if self.gram is None else self.gram
        if matrix is None:
            raise RuntimeError("SecondMoment: rows must have been added first, got none")
        return matrix

    @property
    def units(self) -> int:
        return self._matrix.shape[1]

    def mean_square(self) -> Tensor:
        """Return the mean square of every unit."""
        total = self._matrix.square().sum(0) if self.gram is None else self.gram.diagonal()
        return total / max(1, self.count)

    def scaled(self, factors: Tensor) -> SecondMoment:
        """Return the second moment of the units times ``factors``."""
        other = SecondMoment()
        other.count = self.count
        if self.gram is None:
            other.rows = self._matrix * factors
        else:
            other.gram = self.gram * factors * factors[:, None]
        return other

    def grouped(self, groups: int) -> SecondMoment:
        """Without what units of different groups of a convolution have in common: no weight sees two of them."""
        if groups == 1:
            return self
        other = SecondMoment()
        other.count = self.count
        gram = self._matrix.T @ self._matrix if self.gram is None else self.gram
        group = torch.arange(self.units, device=self._device) // (self.units // groups)
        other.gram = gram * (group[:, None] == group)
        return other

    def preconditioned(self, damping: float, scaling: str, chunks: list[Tensor], groups: int = 1) -> SecondMoment:
        """The second moment in the coordinates in which ``consistency_ops.precondition`` is plain gradient descent.

        With A_c the diagonal block of chunk c, and tau = 1 ("absolute") or the trace scale of its convolution group
        ("trace"), the units are mapped by the inverse Cholesky factor of A_c + damping tau I. With one chunk an
        eigenvalue l becomes l / (l + damping tau). A chunk that cannot be factored stays as it is.

        Args:
            damping, scaling: as for ``consistency_ops.precondition``.
            chunks: the units of every chunk, from :func:`chunks_of`.
            groups: of the convolution; each has its own trace scale.
        """
        scales = torch.ones(groups, dtype=torch.float64, device=self._device)
        if scaling == "trace":
            scales = trace_scale_of(self.mean_square().view(groups, -1))
        other = self.scaled(torch.ones(self.units, dtype=torch.float64, device=self._device))
        for index in (chunk.to(self._device) for chunk in chunks):
            if self.gram is None:
                part = self._matrix[:, index]
                block = part.T @ part
            else:
                block = self.gram[index][:, index]
            block = block / max(1, self.count)
            tau = float(scales[int(index[0]) * groups // self.units])
            factor, info, _ = damped_cholesky(block, damping * tau)
            if info != 0:
                continue
            if other.gram is None:
                rows = other._matrix
                rows[:, index] = torch.linalg.solve_triangular(factor, rows[:, index].T, upper=False).T
            else:
                other.gram[index] = torch.linalg.solve_triangular(factor, other.gram[index], upper=False)
                columns = torch.linalg.solve_triangular(factor, other.gram[:, index].T, upper=False)
                other.gram[:, index] = columns.T
        return other

    @property
    def _device(self) -> torch.device:
        return self._matrix.device

    def spectrum(self) -> Tensor:
        """Return all eigenvalues on the CPU, largest first; NaN if the rows were not finite."""
        matrix = self._matrix @ self._matrix.T if self.gram is None else self.gram
        units = self.units
        if not matrix.isfinite().all():
            return torch.full((units,), torch.nan, dtype=torch.float64)
        values = torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0).clamp(min=0).cpu() / max(1, self.count)
        return torch.cat([values, values.new_zeros(units - len(values))])


def chunks_of(units: int, groups: int, chunk: int, seed: int = 0) -> list[Tensor]:
    """Return the units of every chunk, divided as by ``consistency_ops.precondition`` (groups of 8 units, step 0)."""
    per_group = units // groups
    order = division(per_group, chunk, min(8, chunk), seed)
    pieces = [order[a:b] for a, b in itertools.pairwise(chunk_bounds(per_group, chunk))]
    return [piece + g * per_group for g in range(groups) for piece in pieces]
