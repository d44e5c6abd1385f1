"""Row capture out of torch's own operations: ``csrc/include/consistency_ops/capture.h``, on tensors.

The state of a layer lives where its rows live, and what a call does follows from it; the host only knows the shapes.
So the plan is made on the device too, and a captured CUDA graph goes on from call to call like the kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

USED, SEEN, STRIDE, NEXT, MARK, THINNED, FORWARD, STEP, PAUSED = range(9)  # of the state; the tenth is the kernel's
_MASK = 0xFFFFFFFF
_THINNING = 16  # first purpose of the bits that choose which rows are dropped


def _philox(seed: int, step: Tensor, layer: int, purposes: Tensor) -> Tensor:
    """The first word of ``random.h``'s philox for every purpose, int64; ``step`` is a tensor of one element."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = (step & _MASK).expand_as(purposes), ((step >> 32) & _MASK).expand_as(purposes)
    c2, c3 = torch.full_like(purposes, layer & _MASK), purposes
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64; a shift brings the sign, the mask takes it
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0


def _due(following: Tensor, end: Tensor, stride: Tensor) -> Tensor:
    """How many of the rows next, next + stride, ... lie below ``end``."""
    return ((end - following + stride - 1).clamp(min=0)).div(stride, rounding_mode="floor")


def capture_rows_(
    rows: Tensor, state: Tensor, x: Tensor, index: int, unit_dim: int, seed: int, in_backward: bool = False
) -> None:
    x = x.movedim(unit_dim, -1)
    count, capacity = math.prod(x.shape[:-1]), rows.shape[0]
    if count == 0 or rows.shape[1] == 0:
        return
    layer = state[index]
    used, seen, stride, following, mark, thinned, forward, step, paused = layer[:9].unbind()
    takes = paused == 0
    if in_backward:
        takes = takes & (forward == 0)
    # The rows on the pattern, those in the buffer and those that are due, are halved until they fit: at most so often.
    halvings = math.ceil(math.log2((capacity + count) / capacity))
    purposes = torch.arange(_THINNING - 1, _THINNING + halvings, device=state.device)
    purposes = torch.where(purposes < _THINNING, 0, purposes + thinned)
    bits = _philox(seed % 2**64, step.view(1), index, purposes).unbind()
    first_stride = max(1, -(-count // capacity))
    begins = stride == 0
    following = torch.where(begins, (bits[0] * first_stride) >> 32, following)
    stride = torch.where(begins, first_stride, stride)
    end = seen + count
    move_first, move_stride = torch.zeros_like(used), torch.ones_like(used)
    for word in bits[1:]:
        thins = used + _due(following, end, stride) > capacity
        parity = word & 1
        following = torch.where(thins & (used % 2 != parity), following + stride, following)
        mark = torch.where(thins, (mark - parity + 1).clamp(min=0) // 2, mark)
        used = torch.where(thins, (used - parity + 1).clamp(min=0) // 2, used)
        move_first = torch.where(thins, move_first + parity * move_stride, move_first)
        move_stride, stride = torch.where(thins, move_stride * 2, move_stride), torch.where(thins, stride * 2, stride)
        thinned = torch.where(thins, thinned + 1, thinned)
    added = _due(following, end, stride)
    place = torch.arange(capacity, device=rows.device)
    appended = place - used
    moved = torch.where(appended < 0, move_first + place * move_stride, place).clamp(max=capacity - 1)
    taken = (following - seen + appended * stride).clamp(min=0, max=count - 1)
    is_new = takes & (appended >= 0) & (appended < added)
    moved = torch.where(takes, moved, place)
    rows.copy_(torch.where(is_new[:, None], _select(x, taken).to(rows.dtype), rows.index_select(0, moved)))
    if not in_backward:
        forward = torch.ones_like(forward)
    after = torch.stack([used + added, end, stride, following + added * stride, mark, thinned, forward, step, paused])
    layer[:9].copy_(torch.where(takes, after, layer[:9]))


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
    layer[USED] = kept
    layer[MARK] = kept
