"""Row capture out of torch's own operations: ``csrc/include/consistency_ops/capture.h``, on tensors.

The state of a layer lives where its rows live, and what a call does follows from it; the host only knows the shapes.
So the plan is made on the device too, and a captured CUDA graph goes on from call to call like the kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference import PAIR_DRAW, ROW_DRAW, block_words

# The fields of the state; another one is the kernel's.
USED, SEEN, STRIDE, NEXT, MARK, THINNED, FORWARD, STEP, PAUSED, SKIPPED = range(10)
_FIELDS = 10


def capture_rows_(
    rows: Tensor,
    state: Tensor,
    x: Tensor,
    index: int,
    unit_dim: int,
    seed: int,
    in_backward: bool = False,
    marks: bool = False,
) -> None:
    x = x.movedim(unit_dim, -1)
    count, capacity = math.prod(x.shape[:-1]), rows.shape[0]
    if count == 0 or rows.shape[1] == 0:
        return
    layer = state[index]
    if marks:
        layer[MARK] = layer[USED]
    used, seen, stride, following, mark, thinned, forward, step, paused, skipped = layer[:_FIELDS].unbind()
    takes = paused == 0
    if in_backward:
        takes = takes & (forward == 0)
    # Rows in the buffer and rows that are due are halved until they fit: at most so often, and once more
    # for a block that is incomplete.
    halvings = math.ceil(math.log2((capacity + count) / capacity)) + 1
    # The random words of the levels from here on: of rows, then of pairs of blocks.  Blocks behind the buffer's end
    # matter to no decision.
    levels = thinned + torch.arange(halvings + 1, device=rows.device)
    kinds = torch.full_like(levels, ROW_DRAW), torch.full_like(levels, PAIR_DRAW)
    words = block_words(
        torch.cat(kinds)[:, None], levels.repeat(2)[:, None], capacity + 2, seed % 2**64, step, index, rows.device
    ).view(2, halvings + 1, -1)
    of_rows, seconds = words[0], words[1] >> 31
    place = torch.arange(capacity, device=rows.device)

    def drawn(level: int, block: Tensor) -> Tensor:
        return block * stride + ((of_rows[level].take(block.clamp(max=capacity + 1)) * stride) >> 32)

    def due(level: int) -> Tensor:
        """How many of the blocks used, used + 1, ... give a row below ``end``; the last may be incomplete."""
        last = end // stride
        return torch.where(following >= end, 0, (last - used + (drawn(level, last) < end)).clamp(min=1))

    # The first call: one row of every block, the last of which may be shorter.
    begins = stride == 0
    first_stride = max(1, -(-count // capacity))
    blocks = -(-count // first_stride)
    at_first = (of_rows[0][:capacity] * (count - place * first_stride).clamp(1, first_stride)) >> 32
    stride = torch.where(begins, first_stride, stride)
    skipped = torch.where(begins, blocks * first_stride - count, skipped)
    # Later calls: the last block of the first call goes on, and may have its row from one of them.
    goes_on = ~begins & (skipped > 0)
    last = (used - 1).clamp(min=0)
    place_in_last = (words[1][0].take(last) * stride) >> 32
    replaced = goes_on & (place_in_last >= stride - skipped)
    following = torch.where(replaced, last * stride + place_in_last, following)
    used, mark = torch.where(replaced, last, used), torch.where(replaced, torch.minimum(mark, last), mark)
    skipped = torch.where(goes_on, 0, skipped)
    origin = torch.where(begins, 0, seen + skipped)
    end = origin + count
    doublings = []
    for level in range(halvings):
        thins = ~begins & (used + due(level) > capacity)
        doublings.append(thins)
        second = seconds[level + 1]
        pair, marked, has_row = used // 2, mark // 2, used % 2 == 1
        goes = second.take(pair) == 1
        following = torch.where(thins & goes & ~has_row, drawn(level, used + 1), following)
        mark = torch.where(thins, marked + ((mark % 2 == 1) & (second.take(marked) == 0)), mark)
        used = torch.where(thins, pair + (has_row & ~goes), used)
        stride = torch.where(thins, stride * 2, stride)
        following = torch.where(thins & has_row & ~goes, drawn(level + 1, used), following)
        of_rows[level + 1] = torch.where(thins, of_rows[level + 1], of_rows[level])  # the level is reached, or the last
    added = torch.where(begins, blocks, due(halvings))
    moved = place
    for level, thins in reversed(list(enumerate(doublings))):  # from the last level down to the rows as they lie
        moved = torch.where(thins, 2 * moved + seconds[level + 1].take(moved.clamp(max=capacity - 1)), moved)
    appended = place - used
    taken = place * stride + torch.where(begins, at_first, ((of_rows[halvings][:capacity] * stride) >> 32) - origin)
    taken = torch.where(~begins & (appended == 0), following - origin, taken).clamp(0, count - 1)
    is_new = takes & (appended >= 0) & (appended < added)
    moved = torch.where(takes & (appended < 0), moved, place).clamp(max=capacity - 1)
    rows.copy_(torch.where(is_new[:, None], _select(x, taken).to(rows.dtype), rows.index_select(0, moved)))
    if not in_backward:
        forward = torch.ones_like(forward)
    following = torch.where(added > 0, drawn(halvings, used + added), following)
    thinned = thinned + torch.stack(doublings).sum()
    after = [used + added, seen + count, stride, following, mark, thinned, forward, step, paused, skipped]
    layer[:_FIELDS].copy_(torch.where(takes, torch.stack(after), layer[:_FIELDS]))


def _select(x: Tensor, taken: Tensor) -> Tensor:
    """Rows of (..., units) by their number, without a copy of the others."""
    if x.dim() == 2:
        return x.index_select(0, taken) if x.is_contiguous() else x[taken]
    if x.is_contiguous():
        return x.view(-1, x.shape[-1]).index_select(0, taken)
    digits = []
    for size in reversed(x.shape[:-1]):
        digits.append(taken % size)
        taken = taken // size
    return x[tuple(reversed(digits))]


def capture_mark_(rows: Tensor, state: Tensor, index: int, restart: bool) -> None:
    layer = state[index]
    used, mark = layer[USED], layer[MARK]
    first = torch.where(mark < used, mark, 0) if restart else torch.zeros_like(mark)
    kept = used - first
    if restart:
        place = torch.arange(rows.shape[0], device=rows.device)
        source = torch.where(place < kept, place + first, place).clamp(max=rows.shape[0] - 1)
        rows.copy_(rows.index_select(0, source))
        left_out = first * layer[STRIDE]
        layer[NEXT] -= left_out
        layer[SKIPPED] -= left_out
    layer[USED] = kept
    layer[MARK] = kept
