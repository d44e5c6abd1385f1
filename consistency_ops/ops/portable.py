"""The correction and its stages out of torch's own operations: for every device that torch has, and every width.

The contract is that of ``csrc/include/consistency_ops/precondition.h``, and ``float64`` of ``reference.py`` decides who
is right: the same division, rows, retries and ``info`` as the kernels.  Chunks of one size, of whatever layers, are
factored and inverted in one call of ``torch.linalg``.  Only the shapes decide what is launched: the host never waits
for a device, and a CUDA graph can be captured.  Where the data are on the host already, it looks before it masks.

A chunk may have any width; ``chunk = 0`` makes one of every layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import ROW_DRAW, block_words
from .portable_matrices import Matrices, Source, blocks_of, divide, symmetric_product

# What a dtype can hold without becoming infinite when it is rounded to: just below the midpoint of its largest value
# and the next power of two.
_LARGEST = {torch.bfloat16: 3.3961774292304457e38, torch.float16: 65519.99609375}


# Covariances


def _sampled(
    x: Tensor, unit_dim: int, source: Source, count: Tensor | None, max_rows: int
) -> tuple[Tensor, Tensor | None]:
    """The rows that are used, (rows, units), and where only some of them count, which: a bool a row."""
    if unit_dim != x.dim() - 1:
        x = x.movedim(unit_dim, -1)
    total = math.prod(x.shape[:-1])
    valid: Tensor | None = None
    index: Tensor | None = None
    if count is None or x.device.type == "cpu":
        rows = total if count is None else min(max(int(count), 0), total)
        stride = max(1, -(-rows // max_rows))
        source.rows = -(-rows // stride)
        if stride == 1 and x.dim() == 2:
            return x[:rows], None
        if stride > 1:
            index = _drawn(source, source.rows, stride, rows, x.device)
        elif rows < total:
            return x.reshape(total, -1)[:rows], None
    else:
        count = count.view(()).clamp(0, total)
        if total <= max_rows:
            valid = torch.arange(total, device=x.device) < count
        else:
            apart = ((count + (max_rows - 1)) // max_rows).clamp(min=1)
            valid = torch.arange(max_rows, device=x.device) * apart < count
            index = _drawn(source, max_rows, apart, count, x.device).clamp(0, total - 1)
        source.rows = valid.sum()
    if index is None:
        return x.reshape(total, x.shape[-1]), valid
    digits = []
    for size in reversed(x.shape[:-1]):
        digits.append(index % size)
        index = index // size
    return x[tuple(reversed(digits))], valid


def _drawn(source: Source, blocks: int, stride: int | Tensor, rows: int | Tensor, device: torch.device) -> Tensor:
    """The row of every block: ``reference.sample_rows`` where the data are."""
    begin = torch.arange(blocks, device=device) * stride
    words = block_words(ROW_DRAW, 0, blocks, source.seed, source.step, source.layer, device)
    left = rows - begin
    return begin + ((words * torch.where(left < stride, left, stride)) >> 32)


def _deal(matrix: Tensor, source: Source) -> Tensor:
    """(..., units without the bias) in the order of the division, with a place for the bias whose value is any."""
    if source.gather is not None:
        if matrix.dim() == 2:  # index_select copies runs of memory only where all of it is one
            return matrix.contiguous().index_select(1, source.gather)
        return matrix.index_select(-1, source.gather)
    return torch.cat([matrix, matrix[..., :1]], -1) if source.bias else matrix


def covariance(x: Tensor, unit_dim: int, source: Source, count: Tensor | None, max_rows: int, into: Matrices) -> None:
    """Write ``X_c^T X_c / n`` of every chunk of a layer; with no rows, zero."""
    rows, valid = _sampled(x, unit_dim, source, count, max_rows)
    if source.parts != 1:
        rows = torch.unflatten(rows, -1, (source.parts, -1))
    dealt = _deal(rows, source)
    dealt = dealt.to(into.dtype)
    if source.bias:
        if source.inverse is None:
            dealt[..., -1] = 1
        else:
            dealt.index_fill_(-1, source.inverse[-1:], 1)
    if valid is not None:
        dealt = torch.where(valid.view(-1, *[1] * (dealt.dim() - 1)), dealt, 0)
    for (begin, count_, size), slot in zip(source.blocks, source.slots, strict=True):
        block = torch.unflatten(dealt[..., begin : begin + count_ * size], -1, (count_, size))
        block = block.transpose(0, 1) if block.dim() == 3 else block.permute(1, 2, 0, 3).flatten(0, 1)
        out = into.of_size[size][slot]
        symmetric_product(block, out)
        out.div_(max(source.rows, 1) if isinstance(source.rows, int) else source.rows.clamp(min=1))


# Application


def largest_of(dtypes: Sequence[torch.dtype]) -> float:
    return min(_LARGEST.get(dtype, torch.finfo(dtype).max) for dtype in dtypes)


def apply(
    grad: Tensor,
    bias_grad: Tensor | None,
    source: Source,
    inverses: Matrices,
    kept: dict[int, Tensor] | None,
) -> None:
    """``G[:, c] <- G[:, c] inverse_c`` in place.  ``kept``: of every size, which chunks keep their gradient; None: none
    does.  A row of a chunk whose result is not finite, or too large for the gradient's dtype, is kept, too."""
    outputs, weight_units = grad.shape[:2]
    if grad.numel() == 0 or source.parts == 0:
        return
    taps = grad.numel() // (outputs * weight_units)
    source_matrix = grad.reshape(outputs, weight_units, taps)
    dtype, parts = inverses.dtype, source.parts
    if taps == 1:
        dealt = _deal(source_matrix.squeeze(2), source).unsqueeze(2)
    elif source.gather is not None:
        dealt = source_matrix.contiguous().index_select(1, source.gather)
    else:
        dealt = torch.cat([source_matrix, source_matrix[:, :1]], 1) if source.bias else source_matrix
    dealt = dealt.to(dtype)
    if bias_grad is not None:
        copies = bias_grad.to(dtype).view(-1, 1, 1).expand(-1, 1, taps)
        if source.inverse is None:
            dealt[:, -1:] = copies
        else:
            dealt.index_copy_(1, source.inverse[-1:], copies)
    result = torch.empty_like(dealt, memory_format=torch.contiguous_format)
    largest = largest_of([grad.dtype, grad.dtype if bias_grad is None else bias_grad.dtype])
    all_corrected = True  # as far as the host knows
    for (begin, count, size), slot in zip(source.blocks, source.slots, strict=True):
        span = slice(begin, begin + count * size)
        # (parts, outputs, chunks, size, taps) -> (parts, chunks, outputs, taps, size)
        block, target = (
            torch.unflatten(torch.unflatten(m[:, span], 1, (count, size)), 0, (parts, -1)).permute(0, 2, 1, 4, 3)
            for m in (dealt, result)
        )
        matrix = block.squeeze(3).squeeze(0) if parts == taps == 1 else block.reshape(parts * count, -1, size)
        product = torch.bmm(matrix, inverses.of_size[size][slot])
        corrected = _keep_rows(product, matrix, None if kept is None else kept[size][slot], largest)
        all_corrected = all_corrected and corrected is product
        target.copy_(corrected.view(parts, count, -1, taps, size))
    if bias_grad is not None:
        copies = result.index_select(1, _bias_index(source, grad.device)).squeeze(1)  # (outputs, taps)
        _write(bias_grad, copies.squeeze(1) if taps == 1 else _mean_of_copies(copies), all_corrected)
    in_place = grad.view(outputs, weight_units, taps) if grad.is_contiguous() and grad.dtype == dtype else None
    if source.inverse is None:
        weights = result[:, :weight_units]
    elif in_place is not None:
        torch.index_select(result, 1, source.inverse[:weight_units], out=in_place)
        return
    else:
        weights = result.index_select(1, source.inverse[:weight_units])
    _write(grad, weights.reshape(grad.shape), all_corrected)


def _write(grad: Tensor, values: Tensor, all_corrected: bool) -> None:
    if not all_corrected and grad.dtype != values.dtype:  # a NaN stays the NaN that it was, to the last bit
        values = values.to(grad.dtype)
        values = torch.where(values == values, values, grad)
    grad.copy_(values)


def _bias_index(source: Source, device: torch.device) -> Tensor:
    if source.inverse is not None:
        return source.inverse[-1:]
    return torch.full((1,), source.units - 1, dtype=torch.int64, device=device)


def _keep_rows(corrected: Tensor, before: Tensor, keep: Tensor | None, largest: float) -> Tensor:
    if corrected.device.type == "cpu":
        low, high = torch.aminmax(corrected)
        if -largest <= float(low) and float(high) <= largest and (keep is None or not bool(keep.any())):
            return corrected
    fine = (corrected.abs() <= largest).all(2, keepdim=True)
    if keep is not None:
        fine = fine & ~keep[:, None, None]
    return torch.where(fine, corrected, before)


def _mean_of_copies(copies: Tensor) -> Tensor:
    """Over the taps; equal copies, even infinite ones, are returned as they are."""
    first = copies[:, :1]
    difference = copies - first
    mean = first + torch.where(difference == difference, difference, 0).mean(1, keepdim=True)
    return torch.where(mean.isfinite(), mean, first).squeeze(1)


# The operators


def _spread(entries: Sequence[Tensor], owners: Sequence[int], count: int) -> list[Tensor | None]:
    """The entry of every layer, or None."""
    of_layer: list[Tensor | None] = [None] * count
    for entry, owner in zip(entries, owners, strict=True):
        of_layer[owner] = entry
    return of_layer


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _convolved(grad: Tensor, x: Tensor) -> bool:
    return grad.dim() > 2 and x.dim() == grad.dim()


def _shared(sources: list[Source], given: Sequence[Tensor], counts: Sequence[Tensor | None]) -> list[int]:
    """For every layer the first of its run: the neighbours before it with the same matrices."""
    head = list(range(len(sources)))
    for i in range(1, len(sources)):
        here, before = sources[i], sources[i - 1]
        alike = given[i] is given[i - 1] and counts[i] is counts[i - 1] and here.permutation is before.permutation
        same = (here.units, here.bias, here.group, here.layer) == (
            before.units,
            before.bias,
            before.group,
            before.layer,
        )
        if alike and same and here.parts == before.parts == 1:
            head[i] = head[i - 1]
    return head


def _report(head: list[int], sources: list[Source], info: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """info and damping_used with the entries of every layer, from those of the heads."""
    if head == list(range(len(head))):
        return info, used
    spans = [sources[h].span for h in head]
    return torch.cat([info[span] for span in spans]), torch.cat([used[span] for span in spans])


def _correct(
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sources: list[Source],
    head: list[int],
    matrices: Matrices,
    damping: float,
    trace_scaling: bool,
) -> tuple[Tensor, Tensor]:
    """Invert the matrices and correct the gradients; (info, damping_used) of every layer."""
    info, used = matrices.invert(damping, trace_scaling)
    active = {head[i] for i, grad in enumerate(grads) if grad.numel() > 0}
    keep = info > 0
    for i in set(head):
        source = sources[i]
        span, rows = source.span, source.rows
        if i not in active or source.empty:
            info[span], used[span] = 0, damping
        elif not isinstance(rows, int):
            info[span] = torch.where(rows > 0, info[span], 0)
            used[span] = torch.where(rows > 0, used[span], damping)
            keep[span] |= rows == 0
    kept = None if info.device.type == "cpu" and not bool(keep.any()) else matrices.by_size(keep)
    for i, grad in enumerate(grads):
        source = sources[head[i]]
        if not source.empty:
            apply(grad, biases[i], source, matrices, kept)
    return _report(head, sources, info, used)


def foreach_precondition_(
    grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    permutations: Sequence[Tensor],
    row_counts: Sequence[Tensor],
    bias_layers: Sequence[int],
    permutation_layers: Sequence[int],
    row_count_layers: Sequence[int],
    layers: Sequence[int],
    groups: Sequence[int],
    damping: float,
    trace_scaling: bool,
    chunk: int,
    max_rows: int,
    seed: int,
    step: int,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    count, device = len(grads), grads[0].device
    biases, counts = _spread(bias_grads, bias_layers, count), _spread(row_counts, row_count_layers, count)
    orders = _spread(permutations, permutation_layers, count)
    dtype = _compute_dtype(*grads, *bias_grads, *inputs)
    sources, unit_dims = [], []
    for i, (grad, x) in enumerate(zip(grads, inputs, strict=True)):
        unit_dims.append(1 if _convolved(grad, x) else x.dim() - 1)
        bias = biases[i] is not None
        units = grad.shape[1] + bias
        parts = x.shape[unit_dims[i]] // grad.shape[1] if grad.shape[1] else 1  # without units, a bias alone
        blocks = blocks_of(units, chunk)
        sources.append(Source(units, bias, parts, groups[i], layers[i], orders[i], blocks))
    for source in sources:
        source.seed, source.step = seed % 2**64, step % 2**64
    head = _shared(sources, inputs, counts)
    heads = [sources[i] for i in sorted(set(head))]
    divide(heads, chunk, seed, step, device)
    matrices = Matrices(heads, dtype, device)
    for i in sorted(set(head)):
        if grads[i].shape[1]:
            covariance(inputs[i], unit_dims[i], sources[i], counts[i], max_rows, matrices)
        else:
            sources[i].rows = 0
    return _correct(grads, biases, sources, head, matrices, damping, trace_scaling)


def foreach_covariance(
    inputs: Sequence[Tensor],
    permutations: Sequence[Tensor],
    row_counts: Sequence[Tensor],
    permutation_layers: Sequence[int],
    row_count_layers: Sequence[int],
    layers: Sequence[int],
    groups: Sequence[int],
    unit_dims: Sequence[int],
    units: Sequence[int],
    bias: Sequence[bool],
    chunk: int,
    max_rows: int,
    seed: int,
    step: int,
) -> list[Tensor]:
    count, device = len(inputs), inputs[0].device
    counts = _spread(row_counts, row_count_layers, count)
    orders = _spread(permutations, permutation_layers, count)
    sources = []
    for i, x in enumerate(inputs):
        parts, total = x.shape[unit_dims[i]] // units[i], units[i] + bias[i]
        sources.append(Source(total, bias[i], parts, groups[i], layers[i], orders[i], blocks_of(total, chunk)))
    for source in sources:
        source.seed, source.step = seed % 2**64, step % 2**64
    divide(sources, chunk, seed, step, device)
    matrices = Matrices(sources, _compute_dtype(*inputs), device)
    results = []
    for i, source in enumerate(sources):
        covariance(inputs[i], unit_dims[i], source, counts[i], max_rows, matrices)
        results.append(_padded(matrices, source, chunk or source.units))
    return results


def _padded(matrices: Matrices, source: Source, width: int) -> Tensor:
    """The matrices of a layer as (parts * chunks, width, width), their tails zero."""
    if len(source.blocks) == 1 and source.blocks[0][2] == width:
        slot = source.slots[0]
        whole = matrices.of_size[width]
        return whole if len(whole) == slot.stop - slot.start else whole[slot].clone()
    shape = source.parts, source.chunks_of_part, width, width
    padded = torch.zeros(shape, dtype=matrices.dtype, device=matrices.device)
    at = 0
    for (_, count, size), slot in zip(source.blocks, source.slots, strict=True):
        padded[:, at : at + count, :size, :size] = torch.unflatten(
            matrices.of_size[size][slot], 0, (source.parts, count)
        )
        at += count
    return padded.flatten(0, 1)


def _unpad(stored: Tensor, source: Source, into: Matrices) -> None:
    """The opposite of :func:`_padded`."""
    at = 0
    by_part = torch.unflatten(stored, 0, (source.parts, -1))
    for (_, count, size), slot in zip(source.blocks, source.slots, strict=True):
        of_run = by_part[:, at : at + count, :size, :size]
        torch.unflatten(into.of_size[size][slot], 0, (source.parts, count)).copy_(of_run)
        at += count


def _stored(matrices: Sequence[Tensor], sources: Sequence[Source]) -> Matrices:
    into = Matrices(sources, _compute_dtype(*matrices), matrices[0].device)
    for stored, source in zip(matrices, sources, strict=True):
        _unpad(stored, source, into)
    return into


def foreach_inverse(
    covariances: Sequence[Tensor],
    units: Sequence[int],
    damping: float,
    trace_scaling: bool,
    chunk: int,
    triangular: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor]:
    sources = []
    for stored, of_layer in zip(covariances, units, strict=True):
        blocks = blocks_of(of_layer, chunk)
        parts = len(stored) // max(1, sum(block[1] for block in blocks))
        sources.append(Source(of_layer, False, parts, 1, 0, None, blocks))
    matrices = _stored(covariances, sources)
    info, used = matrices.invert(damping, trace_scaling, triangular)
    failed = info > 0
    if info.device.type != "cpu" or bool(failed.any()):
        for size, given_up in matrices.by_size(failed).items():
            matrices.of_size[size].masked_fill_(given_up[:, None, None], 0)
    return [_padded(matrices, source, chunk or source.units) for source in sources], info, used


def _matrix_sources(
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    matrices: Sequence[Tensor],
    orders: Sequence[Tensor | None],
    layers: Sequence[int],
    groups: Sequence[int],
    chunk: int,
) -> list[Source]:
    sources = []
    for i, grad in enumerate(grads):
        bias = biases[i] is not None
        units = grad.shape[1] + bias
        blocks = blocks_of(units, chunk)
        parts = len(matrices[i]) // max(1, sum(block[1] for block in blocks))
        sources.append(Source(units, bias, parts, groups[i], layers[i], orders[i], blocks))
    return sources


def foreach_apply_(
    grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor],
    inverses: Sequence[Tensor],
    info: Tensor,
    permutations: Sequence[Tensor],
    bias_layers: Sequence[int],
    permutation_layers: Sequence[int],
    layers: Sequence[int],
    groups: Sequence[int],
    chunk: int,
    seed: int,
    step: int,
    triangular: bool = False,  # the product takes any matrices
) -> None:
    biases = _spread(bias_grads, bias_layers, len(grads))
    orders = _spread(permutations, permutation_layers, len(grads))
    sources = _matrix_sources(grads, biases, inverses, orders, layers, groups, chunk)
    divide(sources, chunk, seed, step, grads[0].device)
    matrices = _stored(inverses, sources)
    keep = info != 0
    kept = None if info.device.type == "cpu" and not bool(keep.any()) else matrices.by_size(keep)
    for grad, bias, source in zip(grads, biases, sources, strict=True):
        apply(grad, bias, source, matrices, kept)


def foreach_correct_(
    grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor],
    covariances: Sequence[Tensor],
    permutations: Sequence[Tensor],
    bias_layers: Sequence[int],
    permutation_layers: Sequence[int],
    layers: Sequence[int],
    groups: Sequence[int],
    damping: float,
    trace_scaling: bool,
    chunk: int,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    count = len(grads)
    biases = _spread(bias_grads, bias_layers, count)
    orders = _spread(permutations, permutation_layers, count)
    sources = _matrix_sources(grads, biases, covariances, orders, layers, groups, chunk)
    head = _shared(sources, covariances, [None] * count)
    numbers = sorted(set(head))
    heads = [sources[i] for i in numbers]
    divide(heads, chunk, seed, step, grads[0].device)
    matrices = _stored([covariances[i] for i in numbers], heads)
    return _correct(grads, biases, sources, head, matrices, damping, trace_scaling)
