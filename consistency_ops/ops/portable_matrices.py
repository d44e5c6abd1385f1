"""The chunks of all layers as a few batches of matrices: how layers are divided, damped, factored and inverted.

Part of ``portable.py``, which says what holds for all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..reference import MAX_TRIES, trace_scale
from .division import divisions

# Wider chunks are inverted and multiplied by blocks, in few large products.  LAPACK's inverse, which cholesky_inverse
# calls, has very many short parallel regions: with 768 units and two threads on a busy machine it took a hundred times
# as long as with one.  torch has no inverse of a triangle and no symmetric product; solving with an identity instead is
# three times the arithmetic of an inverse, and a whole product twice that of its triangle.
_FEW = 256
_BASE = 128  # units whose triangle is inverted by solving
_PANELS = 16  # of a symmetric product: it then is 17 / 32 of the whole
Blocks = tuple[tuple[int, int, int], ...]


@functools.lru_cache(maxsize=1024)
def blocks_of(units: int, chunk: int) -> Blocks:
    """The chunks of a layer as runs of equal size, (first position, chunks, size): at most two, the larger first."""
    if units == 0:
        return ()
    count = -(-units // (chunk or units))
    size, larger = divmod(units, count)
    runs = ((0, larger, size + 1), (larger * (size + 1), count - larger, size))
    return tuple(run for run in runs if run[1])


@dataclass(eq=False)
class Source:
    """Where the matrices of one layer, or of neighbours that share them, come from."""

    units: int  # with the bias
    bias: bool
    parts: int  # groups of a convolution, which share one division
    group: int
    layer: int
    permutation: Tensor | None
    blocks: Blocks
    first_chunk: int = 0  # of the launch, in the order of info
    gather: Tensor | None = None  # (units,): the unit at every position, 0 for the bias; None: the natural order
    inverse: Tensor | None = None  # (units,): the position of every unit
    slots: tuple[slice, ...] = ()  # for every run of `blocks`: its chunks among all of that size
    seed: int = 0
    step: int = 0
    rows: int | Tensor = 1  # that are used, a number or an int64 scalar on the device

    @property
    def chunks_of_part(self) -> int:
        return sum(count for _, count, _ in self.blocks)

    @property
    def chunks(self) -> int:
        return self.parts * self.chunks_of_part

    @property
    def span(self) -> slice:
        """Its entries of info."""
        return slice(self.first_chunk, self.first_chunk + self.chunks)

    @property
    def empty(self) -> bool:
        """Whether the host knows that there is not one row."""
        return isinstance(self.rows, int) and self.rows == 0


@functools.lru_cache(maxsize=16)
def _host_orders(
    units: tuple[int, ...], bias: tuple[bool, ...], groups: tuple[int, ...], layers: tuple[int, ...], *rest: int
) -> tuple[np.ndarray, list[int]]:
    """For every layer its order and the inverse of it, all in one array; the bias is read at 0."""
    pieces = []
    for order, has_bias in zip(divisions(units, groups, layers, *rest), bias, strict=True):
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        pieces += [np.where(order == len(order) - 1, 0, order) if has_bias else order, inverse]
    return np.concatenate(pieces), [len(piece) for piece in pieces]


def _upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Without a wait: a copy from pinned memory can be in flight, and in a CUDA graph, whose copy keeps the memory."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    pinned = tensor.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _in_graphs.append(pinned)
    return pinned.to(device, non_blocking=True)


_in_graphs: list[Tensor] = []  # read again by every replay


def divide(sources: Sequence[Source], chunk: int, seed: int, step: int, device: torch.device) -> None:
    """Draw the divisions of layers with several chunks, all at once, and bring them to the device."""
    drawn = [s for s in sources if s.permutation is None and s.chunks_of_part > 1]
    if drawn:
        table, lengths = _host_orders(
            tuple(s.units for s in drawn),
            tuple(s.bias for s in drawn),
            tuple(s.group for s in drawn),
            tuple(s.layer for s in drawn),
            chunk,
            seed % 2**64,
            step % 2**64,
        )
        pieces = torch.split(_upload(table, device), lengths)
        for i, source in enumerate(drawn):
            source.gather, source.inverse = pieces[2 * i : 2 * i + 2]
    for source in sources:
        if source.permutation is not None:
            source.inverse = source.permutation.argsort()
            source.gather = (
                source.permutation.clamp(max=max(0, source.units - 2)) if source.bias else source.permutation
            )


class Matrices:
    """The chunks of all layers, those of one size in one tensor (chunks, size, size)."""

    def __init__(self, sources: Sequence[Source], dtype: torch.dtype, device: torch.device) -> None:
        counts: dict[int, int] = {}
        first = 0
        for source in sources:
            source.first_chunk = first
            first += source.chunks
            slots = []
            for _, count, size in source.blocks:
                begin = counts.get(size, 0)
                counts[size] = begin + source.parts * count
                slots.append(slice(begin, counts[size]))
            source.slots = tuple(slots)
        self.sources: Sequence[Source] = sources
        self.dtype: torch.dtype = dtype
        self.device: torch.device = device
        self.chunks: int = first
        self.of_size: dict[int, Tensor] = {
            n: torch.empty(count, n, n, dtype=dtype, device=device) for n, count in counts.items()
        }
        self._table: Tensor | None = None

    def _places(self) -> tuple[Tensor | None, Tensor]:
        """Of every chunk in the order of info: its place when sizes follow one another, None where that is the same.
        Of every chunk in the order of sizes: the layer, or the group of a convolution, that it belongs to."""
        if self._table is None:
            begin: dict[int, int] = {}
            at, before = 0, 0
            for size, matrices in self.of_size.items():
                begin[size] = at
                at += len(matrices)
            place, family = np.empty(at, np.int64), np.empty(at, np.int64)
            for source in self.sources:
                chunks, chunk = source.chunks_of_part, 0
                for (_, count, size), slot in zip(source.blocks, source.slots, strict=True):
                    flat = begin[size] + np.arange(slot.start, slot.stop)
                    part, within = np.divmod(np.arange(source.parts * count), count)
                    place[source.first_chunk + part * chunks + chunk + within] = flat
                    family[flat] = before + part
                    chunk += count
                before += source.parts
            self._identity = bool((place == np.arange(at)).all())
            self._families = before
            self._table = _upload(np.concatenate([place, family]), self.device)
        places, families = torch.split(self._table, self.chunks)
        return (None if self._identity else places), families

    def in_order(self, values: Tensor) -> Tensor:
        """One value a chunk, sizes one after the other, in the order of info."""
        place, _ = self._places()
        return values if place is None else values.index_select(0, place)

    def by_size(self, values: Tensor) -> dict[int, Tensor]:
        """The opposite of :meth:`in_order`, cut into sizes."""
        if not self.of_size:
            return {}
        place, _ = self._places()
        if place is not None:
            values = torch.empty_like(values).index_copy_(0, place, values)
        return dict(zip(self.of_size, self._split(values), strict=True))

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return torch.split(values, [len(matrices) for matrices in self.of_size.values()])

    def scale_by_trace(self, diagonals: list[Tensor], finite: list[Tensor]) -> None:
        """Divide each family by the mean of its finite diagonal entries, where that is positive."""
        _, family = self._places()
        sums = torch.cat([torch.where(ok, d, 0).sum(1) for d, ok in zip(diagonals, finite, strict=True)])
        counts = torch.cat([ok.sum(1) for ok in finite]).to(self.dtype)
        total = torch.zeros(2, self._families, dtype=self.dtype, device=self.device)
        total.index_add_(1, family, torch.stack([sums, counts]))
        tau = trace_scale(total[0], total[1]).index_select(0, family)
        for matrices, scale in zip(self.of_size.values(), self._split(tau), strict=True):
            matrices.div_(scale[:, None, None])

    def invert(self, damping: float, trace_scaling: bool, triangular: bool = False) -> tuple[Tensor, Tensor]:
        """Every matrix A becomes (A + damping I)^-1, or ``triangular`` L^-1 with L L^T = A + damping I; of those given
        up nothing is said.  Returns (info, damping_used) in the order of info."""
        if not self.of_size:
            nothing = torch.empty(0, dtype=torch.int32, device=self.device)
            return nothing, nothing.to(torch.float32)
        diagonals = [matrices.diagonal(dim1=-2, dim2=-1) for matrices in self.of_size.values()]
        finite = [diagonal.isfinite() for diagonal in diagonals]
        good = torch.cat([ok.all(1) for ok in finite])
        on_host = self.device.type == "cpu"
        all_good = on_host and bool(good.all())
        if not all_good:  # the first unit that has no finite second moment, counted from 1
            first_bad = torch.cat([(~ok).to(torch.int32).argmax(1) for ok in finite]) + 1
        if trace_scaling:
            self.scale_by_trace(diagonals, finite)
        infos, useds = [], []
        for size, goods in zip(self.of_size, self._split(good), strict=True):
            matrices = self.of_size[size]
            if not all_good:
                matrices.masked_fill_(~goods[:, None, None], 0)
            factor, info, used = _factor(matrices, float(damping), on_host)
            self.of_size[size] = _inverse_factor(factor) if triangular else _inverse(factor, info, matrices)
            infos.append(info)
            useds.append(used)
        info, used = torch.cat(infos).to(torch.int32), torch.cat(useds)
        if not all_good:
            info = torch.where(good, info, first_bad.to(torch.int32))
            used = torch.where(good, used, float(damping) * 10.0 * 10.0)
        return self.in_order(info), self.in_order(used)


def _factor(matrices: Tensor, damping: float, on_host: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(factor, info, damping used): the lower Cholesky factors of ``matrices + damping I``, which is left in place of
    the matrices; those that fail are tried again with ten and a hundred times the damping."""
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(damping)
    factor, info = torch.linalg.cholesky_ex(matrices)
    used = torch.full((len(matrices),), damping, dtype=torch.float32, device=matrices.device)
    for _ in range(MAX_TRIES - 1):
        if on_host and not bool(info.any()):
            break
        diagonal.add_(9 * damping)
        damping *= 10
        failed = info > 0
        if on_host:
            again = failed.nonzero().squeeze(1)
            factor[again], info[again] = torch.linalg.cholesky_ex(matrices[again])
        else:
            new_factor, new_info = torch.linalg.cholesky_ex(matrices)
            factor = torch.where(failed[:, None, None], new_factor, factor)
            info = torch.where(failed, new_info, info)
        used = torch.where(failed, damping, used)
    return factor, info, used


def _inverse_factor(factor: Tensor) -> Tensor:
    if factor.shape[-1] > _FEW:
        _invert_triangle_(factor)
        return factor.contiguous()
    return _solved(factor).contiguous()


def _inverse(factor: Tensor, info: Tensor, into: Tensor) -> Tensor:
    """The inverse of ``L L^T``; that of wide chunks is left in ``into``, so that it takes no memory of its own."""
    size, on_host = factor.shape[-1], factor.device.type == "cpu"
    if size > _FEW:
        _invert_triangle_(factor)
        return symmetric_product(factor, into, lower=True)
    if on_host:
        if bool(info.any()):  # cholesky_inverse raises for them
            factor[info > 0] = torch.eye(size, dtype=factor.dtype)
        return torch.cholesky_inverse(factor).contiguous()  # as one that was stored: products then have the same bits
    # On a device cholesky_inverse may wait for its info, and this has none.
    eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
    return torch.cholesky_solve(eye.expand_as(factor), factor).contiguous()


def _solved(factor: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    result: Tensor = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return result


def _invert_triangle_(lower: Tensor) -> None:
    """Lower triangles in place: ``[A 0; B C]`` becomes ``[A^-1 0; -C^-1 B A^-1 C^-1]``, and so on inside of A and C."""
    size = lower.shape[-1]
    if size <= _BASE:
        lower.copy_(_solved(lower))
        return
    half = -(-size // 64) * 32
    first, last, below = lower[..., :half, :half], lower[..., half:, half:], lower[..., half:, :half]
    solved = torch.linalg.solve_triangular(last, below, upper=False)
    torch.neg(torch.linalg.solve_triangular(first, solved, upper=False, left=False), out=below)
    _invert_triangle_(first)
    _invert_triangle_(last)


def symmetric_product(matrices: Tensor, out: Tensor, lower: bool = False) -> Tensor:
    """``M^T M`` of every matrix into ``out``; ``lower``: of lower triangles, whose rows above the diagonal are zero.

    Above ``_FEW`` columns the upper triangle is computed, panel by panel, and copied below.
    """
    size = matrices.shape[-1]
    if size <= _FEW:
        return torch.bmm(matrices.mT, matrices, out=out)
    width = max(_FEW, -(-size // (32 * _PANELS)) * 32)
    for begin in range(0, size, width):
        end = min(begin + width, size)
        rows = matrices[:, begin:] if lower else matrices
        out[:, :end, begin:end] = torch.bmm(rows[..., :end].mT, rows[..., begin:end])
        out[:, begin:end, :begin] = out[:, :begin, begin:end].mT
    return out
